"""Metrics; above all, that generated code can do no harm and gets the score it deserves."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from trainer.tasks import metrics, sandbox
from trainer.tasks.metrics import accuracy, execution, matches

PLUS_ONE = [{"args": [3], "result": 4}, {"args": [0], "result": 1}]
GOOD = "def f(x): return x + 1"


def score(code: str, tests: list | None = None, **limits) -> float:
    (only,) = execution([code], [tests or PLUS_ONE], **limits)
    return only


@pytest.fixture(params=[True, False], ids=["seccomp", "no-seccomp"])
def seccomp(request) -> bool:
    """With the kernel's filter, and with the layers that stand in for it."""
    return request.param


def test_sets_of_labels():
    right = [["a", "b"], ["c"], ["a"]]
    perfect = metrics.multi_label([["b", "a"], ["c"], ["a"]], right, "abc")
    assert perfect == {"f1": 1.0, "exact_match": 1.0}
    # 2 right of 5 written (one unknown) and 4 due: precision 2/5, recall 2/4
    some = metrics.multi_label([["a", "c", "x"], ["c"], ["b"]], right, "abc")
    assert some == {"f1": pytest.approx(2 * 2 / (5 + 4)), "exact_match": pytest.approx(1 / 3)}
    assert metrics.multi_label([[], [], []], right, "abc") == {"f1": 0.0, "exact_match": 0.0}


def test_accuracy_and_matches():
    assert accuracy([0, 1, 2, 2], [0, 1, 2, 0]) == 0.75
    assert matches([" a\n", "b", "C"], ["a", " b", "c"]) == [True, True, False]
    with pytest.raises(ValueError, match="no rows"):
        accuracy([], [])
    with pytest.raises(ValueError, match="zip"):
        matches(["a"], [])


def test_right_wrong_and_broken_code():
    texts = [
        f"  {GOOD}\n",
        "    def f(x):\n        return x + 1",
        "import math\ndef f(x): return x + math.floor(1.5)",
        "f = lambda x: x + 1.0",
        "def f(x): return x",
        "def f(x): return x + 1 if x else 0",
        "def g(x): return x + 1",
        "def f(x) return x + 1",
        "def f(x): return str(x + 1)",
        "def f(x): return [x + 1]",
        "def f(x): return object()",
        "def f(): return 4",
        "def f(x): return f(x)",
        "def f(x): raise SystemExit(0)",
        "import os\ndef f(x): os._exit(0)",
        "def f(x): return int(input())",
        "\x00",
        "",
    ]
    assert execution(texts, [PLUS_ONE] * len(texts)) == [1.0] * 4 + [0.0] * 14


def test_results_are_compared_as_json_values():
    tests = [{"args": [], "result": [1, {"a": [True, None, 0.3]}]}]
    assert score("def f(): return (1, {'a': [True, None, 0.1 + 0.2]})", tests) == 1
    assert score("def f(): return [1, {'a': [1, None, 0.3]}]", tests) == 0
    assert score("def f(): return True", [{"args": [], "result": 1}]) == 0
    big = 10**40
    assert score(f"def f(): return {big} + 1", [{"args": [], "result": big + 1}]) == 1
    assert score(f"def f(): return {big}", [{"args": [], "result": big + 1}]) == 0
    lazy = "class A(int):\n    def __eq__(self, other): return True\ndef f(): return A(1)"
    assert score(lazy, [{"args": [], "result": 2}]) == 0


def test_arguments_are_each_tests_own():
    tests = [{"args": [[2, 1]], "result": [1, 2]}, {"args": [[2, 1]], "result": [1, 2]}]
    assert score("def f(x):\n    x.sort()\n    return x", tests) == 1


def test_many_snippets_in_a_few_seconds():
    start = time.monotonic()
    assert execution([GOOD, "def f(x): return 0"] * 60, [PLUS_ONE] * 120) == [1.0, 0.0] * 60
    assert time.monotonic() - start < 15  # about 1 s on an idle machine


@pytest.mark.parametrize(
    "body",
    [
        "while True: pass",
        "while True:\n        try:\n            while True: pass\n        except: pass",
        "return len(str(10 ** 10 ** 9))",
        "import signal; signal.signal(signal.SIGPROF, signal.SIG_IGN)\n    while True: pass",
        "import re; return re.match('(a+)+b', 'a' * 60)",
    ],
)
def test_endless_code_is_ended(body):
    code = f"def f(x):\n    {body}"
    start = time.monotonic()
    assert execution([GOOD, code, GOOD], [PLUS_ONE] * 3, cpu_seconds=0.2) == [1.0, 0.0, 1.0]
    assert time.monotonic() - start < 10


def test_waiting_code_is_ended(seccomp):
    code = "import time\ndef f(x):\n    time.sleep(60)\n    return x + 1"
    start = time.monotonic()
    assert score(code, wall_seconds=0.5, seccomp=seccomp) == 0
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    "body",
    [
        "return 'x' * 10 ** 12",
        "return [i for i in iter(int, 1)]",
        "a = []\n    while True: a.append('x' * 10 ** 6)",
        "return 'x' * 10 ** 8",
    ],
)
def test_memory_bombs(body):
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    code = f"def f(x):\n    {body}"
    assert execution([code, GOOD], [PLUS_ONE] * 2, memory_mb=128) == [0.0, 1.0]
    after = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    assert max(0, after - before) < 400_000  # kB


@pytest.mark.parametrize(
    "body",
    [
        "import os; os.fork()",
        "import os; os.posix_spawn('/bin/true', ['true'], {})",
        "import os; os.execv('/bin/true', ['true'])",
        "import subprocess; subprocess.run(['true'])",
        "import threading; t = threading.Thread(target=print); t.start()",
        "import socket; socket.socket()",
        "import ctypes; ctypes.CDLL(None).fork()",
        "import os; os.kill(os.getppid(), 9)",
    ],
)
def test_processes_and_sockets_are_refused(body, seccomp):
    code = f"def f(x):\n    {body}\n    return x + 1"
    assert execution([code, GOOD], [PLUS_ONE] * 2, seccomp=seccomp) == [0.0, 1.0]


def test_a_fork_bomb_leaves_nothing(seccomp):
    code = (
        "import os\ndef f(x):\n    while True:\n"
        "        try:\n            os.fork()\n        except BaseException:\n            pass"
    )
    assert score(code, cpu_seconds=0.2, wall_seconds=1, seccomp=seccomp) == 0
    lines = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    assert not [line for line in lines if sandbox.__file__ in line]


def test_root_is_limited_without_the_audit_hook(tmp_path):
    """The layers below Python hold by themselves, also for root and also without seccomp."""
    for layer in ("seccomp", "nobody"):
        code = f"""
import os, sys
sys.path.insert(0, {str(Path(sandbox.__file__).parents[2])!r})
from trainer.tasks import sandbox
sandbox.limit(1, 1 << 28)
if {layer!r} == "nobody":
    sandbox.drop_root()
else:
    import ctypes
    assert sandbox.apply_seccomp(ctypes.CDLL(None), sandbox.seccomp_program())
for attempt in (os.fork, lambda: os.remove({str(tmp_path)!r} + "/keep")):
    try:
        attempt()
    except OSError:
        continue
    print("not refused", attempt)
try:
    file = open({str(tmp_path)!r} + "/new", "w")
    file.write("x" * 10)
    file.close()
except OSError:
    os._exit(0)
print("written")
"""
        if layer == "seccomp" and not sandbox.works(
            sandbox.ctypes.CDLL(None), sandbox.seccomp_program()
        ):
            continue
        if layer == "nobody" and os.geteuid() != 0:
            continue
        (tmp_path / "keep").write_text("here")
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False
        )
        assert (done.stdout, done.returncode) == ("", 0), (layer, done.stderr)
        assert not (tmp_path / "new").exists()
        assert (tmp_path / "keep").exists()


def test_files_are_left_alone(tmp_path, seccomp):
    victim = tmp_path / "victim"
    victim.write_text("here")
    bodies = [
        f"open({str(tmp_path / 'new')!r}, 'w').write('x')",
        f"open({str(victim)!r}, 'a').write('x')",
        f"import os; os.open({str(tmp_path / 'new')!r}, os.O_CREAT | os.O_WRONLY)",
        f"import os; os.remove({str(victim)!r})",
        f"import shutil; shutil.rmtree({str(tmp_path)!r})",
        f"import os; os.mkdir({str(tmp_path / 'dir')!r})",
        f"import os; os.rename({str(victim)!r}, {str(tmp_path / 'new')!r})",
        f"import os; os.chmod({str(victim)!r}, 0)",
        "open('here', 'w').write('x')",
    ]
    codes = [f"def f(x):\n    {body}\n    return x + 1" for body in bodies]
    assert execution(codes, [PLUS_ONE] * len(codes), seccomp=seccomp) == [0.0] * len(codes)
    assert [path.name for path in tmp_path.iterdir()] == ["victim"]
    assert victim.read_text() == "here"


def test_prints_are_lost_and_forge_no_score(capfd):
    codes = [
        "print('ready\\n1 1.0\\n' * 10000)\ndef f(x):\n    print(x)\n    return x + 1",
        "import os\ndef f(x):\n    for fd in (0, 1, 2, 4, 5, 6, 7):\n"
        "        try: os.write(fd, b'1 1.0\\n')\n        except OSError: pass\n    return x",
        "import sys\nsys.stderr.write('x' * 100000)\ndef f(x): return 0",
    ]
    assert execution(codes, [PLUS_ONE] * 3) == [1.0, 0.0, 0.0]
    assert capfd.readouterr() == ("", "")


def test_snippets_see_no_environment_and_not_each_other(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hush")
    tests = [{"args": [], "result": [False, False]}]
    look = (
        "import os, builtins\n"
        "def f(): return ['SECRET_TOKEN' in os.environ, hasattr(builtins, 'mark')]"
    )
    spoil = (
        "import builtins\nbuiltins.mark = 1\nbuiltins.len = None\ndef f(): return [False, False]"
    )
    assert execution([spoil, look], [tests] * 2, processes=1) == [1.0, 1.0]


def test_a_sandbox_that_is_brought_down_is_started_again(monkeypatch):
    """Whatever kills the server, only the snippet that ran then fails."""
    runs = []
    real = metrics._run_sandbox

    def dies_at_once(request, wall_seconds):
        runs.append(len(request["jobs"]))
        return {} if len(runs) == 1 else real(request, wall_seconds)

    monkeypatch.setattr(metrics, "_run_sandbox", dies_at_once)
    assert execution([GOOD] * 3, [PLUS_ONE] * 3) == [0.0, 1.0, 1.0]
    assert runs == [3, 2]


def test_a_sandbox_that_does_not_start_is_an_error(monkeypatch):
    with pytest.raises(RuntimeError, match="a function that is right fails under the limits"):
        score(GOOD, function="no name")
    monkeypatch.setattr(metrics, "_SANDBOX", Path("/none/sandbox.py"))
    with pytest.raises(RuntimeError, match="does not start"):
        score(GOOD)
    assert execution([], []) == []
    with pytest.raises(ValueError, match="text 0 has no tests"):
        execution([GOOD], [[]])
