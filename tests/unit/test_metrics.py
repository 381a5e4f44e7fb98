"""Metrics; above all, that generated code can do no harm and gets the score it deserves."""

from __future__ import annotations

import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from trainer.config import Task
from trainer.data.column_parsers import parse_tests
from trainer.evaluation import code_sandbox, metrics
from trainer.evaluation.metrics import accuracy, execution, matches
from trainer.runtime.errors import BadInput

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
    task = Task(
        name="t", train=["t"], input="{a}", target="{b}", choices=["a", "b", "c"],
        multi_label=True, metric="f1",
    )  # fmt: skip
    gold = [["a", "b"], ["c"], ["a"]]
    perfect = metrics.label_set_scores([["b", "a"], ["c"], ["a"]], gold, task)
    assert (perfect["f1"], perfect["exact_match"]) == (1.0, 1.0)
    # 2 correct of 5 predicted (one unknown) and 4 gold labels: precision 2/5, recall 2/4
    some = metrics.label_set_scores([["a", "c", "x"], ["c"], ["b"]], gold, task)
    assert some["f1"] == pytest.approx(2 * 2 / (5 + 4))
    assert some["exact_match"] == pytest.approx(1 / 3)
    nothing = metrics.label_set_scores([[], [], []], gold, task)
    assert (nothing["f1"], nothing["exact_match"]) == (0.0, 0.0)
    exact = task.model_copy(update={"metric": "exact_match"})
    assert metrics.label_set_scores(gold, gold, exact) == {"exact_match": 1.0}


def test_f1_of_sets_is_that_of_scikit_learn():
    from sklearn.metrics import accuracy_score, f1_score
    from sklearn.preprocessing import MultiLabelBinarizer

    draw = random.Random(0)
    task = Task(
        name="t", train=["t"], input="{a}", target="{b}", choices=list("abcde"),
        multi_label=True, metric="f1",
    )  # fmt: skip
    for _ in range(50):
        gold = [draw.sample("abcde", draw.randint(0, 4)) for _ in range(9)]
        predicted = [draw.sample("abcdexy", draw.randint(0, 4)) for _ in range(9)]
        binarizer = MultiLabelBinarizer(classes=list("abcdexy"))
        gold_RC, predicted_RC = binarizer.fit_transform(gold), binarizer.transform(predicted)
        scores = metrics.label_set_scores(predicted, gold, task)
        expected = f1_score(gold_RC, predicted_RC, average="micro", zero_division=0.0)
        assert scores["f1"] == expected
        assert scores["exact_match"] == accuracy_score(gold_RC, predicted_RC)


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
    (nan,) = parse_tests('[{"args": [], "result": {"a": [NaN, Infinity]}}]')
    assert score("def f(): return {'a': [float('nan'), float('inf')]}", [nan]) == 1
    assert score("def f(): return {'a': [1.0, float('inf')]}", [nan]) == 0
    assert score("def f(): return float('nan')", [{"args": [], "result": 1.0}]) == 0
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
        "import ctypes; assert ctypes.CDLL(None).fork() >= 0",
    ],
)
def test_processes_and_sockets_are_refused(body, seccomp):
    code = f"def f(x):\n    {body}\n    return x + 1"
    assert execution([code, GOOD], [PLUS_ONE] * 2, seccomp=seccomp) == [0.0, 1.0]


def test_a_fork_bomb_leaves_nothing(seccomp, tmp_path, monkeypatch):
    copy = tmp_path / "sandbox.py"  # others may be running the original
    copy.write_bytes(Path(code_sandbox.__file__).read_bytes())
    monkeypatch.setattr(metrics, "_SANDBOX", copy)
    code = (
        "import os\ndef f(x):\n    while True:\n"
        "        try:\n            os.fork()\n        except BaseException:\n            pass"
    )
    assert score(code, cpu_seconds=0.2, wall_seconds=1, seccomp=seccomp) == 0
    lines = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    assert not [line for line in lines if str(copy) in line]


#: Runs a list of attempts, as text; those that succeed are the value of ``f``, which should be [].
ATTEMPTS = """
def f(*attempts):
    done = []
    for attempt in attempts:
        try:
            exec(attempt, {})
        except BaseException:
            continue
        done.append(attempt)
    return done
"""


@pytest.fixture
def victim() -> Iterator[subprocess.Popen[bytes]]:
    """A process that a program would like to end."""
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        assert process.poll() is None
        process.kill()


def test_no_signal_reaches_another_process(seccomp, victim):
    targets = [victim.pid, os.getpid(), os.getppid()]
    attempts = [
        *(f"import os; os.kill({pid}, 9)" for pid in targets),
        *(f"import os; os.killpg({pid}, 9)" for pid in targets),
        *(
            f"import ctypes; assert ctypes.CDLL(None, use_errno=True).kill({pid}, 9) == 0"
            for pid in targets
        ),
        *(f"import signal; signal.pidfd_send_signal({pid}, 9)" for pid in targets),
    ]
    assert score(ATTEMPTS, [{"args": attempts, "result": []}], seccomp=seccomp) == 1
    # The signal that the kernel sends when a pipe is ready, to another process than its reader.
    owner = (
        "import fcntl, os, sys\ndef f(pid):\n    for fd in range(10):\n        try:\n"
        "            fcntl.fcntl(fd, fcntl.F_SETOWN, pid)\n"
        "            fcntl.fcntl(fd, 10, 9)\n"  # F_SETSIG
        "            fcntl.fcntl(fd, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)\n"
        "            os.write(fd, b'[')\n"
        "        except OSError: pass\n"
    )
    tests = [[{"args": [pid], "result": 0}] for pid in targets]
    assert execution([owner, owner, owner, GOOD], [*tests, PLUS_ONE], seccomp=seccomp)[3] == 1
    assert [psutil.pid_exists(pid) for pid in targets] == [True] * 3


def test_code_cannot_open_files_or_terminals(seccomp, tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hush")
    (tmp_path / "rows.jsonl").write_text("{}")
    tmp_path.chmod(0o755)
    master, terminal = os.openpty()
    paths = [
        *(f"/proc/{pid}/{name}" for pid in ("self", 1, os.getpid()) for name in ("environ", "mem")),
        f"/proc/{os.getppid()}/environ",
        "/etc/passwd",
        str(tmp_path / "rows.jsonl"),
        os.ttyname(terminal),
        "/dev/tty",
        "/dev/null",
        "/",
        ".",
    ]
    attempts = [f"import os; os.open({path!r}, os.O_RDONLY)" for path in paths]
    attempts += [f"import os; os.chmod({path!r}, 0o777)" for path in paths[:-2]]
    attempts += [
        f"import fcntl, termios; fcntl.ioctl({fd}, termios.TIOCSTI, b'x')" for fd in range(64)
    ]
    attempts += [
        "import os; os.pipe()",
        "import os; os.dup(0)",
        "import _socket; _socket.socket()",
        "import ctypes; assert ctypes.CDLL(None).open(b'/etc/passwd', 0) >= 0",
        "import ctypes; assert ctypes.CDLL(None).memfd_create(b'x', 0) >= 0",
        "import ctypes; assert ctypes.CDLL(None).ptrace(16, 1, 0, 0) == 0",  # PTRACE_ATTACH
        "import ctypes; assert ctypes.CDLL(None).setuid(0) == 0",
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (9, 9))",
        "import os; assert 'SECRET_TOKEN' in os.environ",
        "import ctypes; assert ctypes.CDLL(None).getenv(b'SECRET_TOKEN')",
        "import os; assert os.geteuid() == 0",
    ]
    assert score(ATTEMPTS, [{"args": attempts, "result": []}], seccomp=seccomp) == 1
    os.set_blocking(master, False)
    with pytest.raises(BlockingIOError):
        os.read(master, 1)
    os.close(master)
    os.close(terminal)


def test_expected_results_are_not_in_the_program(seccomp):
    """Neither in its frames nor in any object of the process."""
    code = """
import gc, sys
def f(x):
    seen, found, todo = set(), [], [*gc.get_objects()]
    frame = sys._getframe()
    while frame:
        todo += [frame.f_locals, frame.f_globals]
        frame = frame.f_back
    while todo:
        one = todo.pop()
        if id(one) not in seen:
            seen.add(id(one))
            todo += gc.get_referents(one)
            if type(one) is str and one[:7] == "answer-" and len(one) == 12:
                found.append(one)
            if type(one) is bytes and x[:2].encode() in one and b"results" in one:
                found.append("answer-" + x)
    return found[0] if found else None
"""
    tests = [[{"args": [f"q{i:04}"], "result": f"answer-{i:05}"}] for i in range(5)]
    limits = {"cpu_seconds": 5, "wall_seconds": 10, "seccomp": seccomp}
    assert execution([code] * 5, tests, **limits) == [0.0] * 5
    nothing = [[{"args": ["q"], "result": None}]] * 5
    assert execution([code] * 5, nothing, **limits) == [1.0] * 5, "the search itself works"


def test_a_program_writes_no_values_of_others(seccomp):
    forge = "import os\ndef f(x):\n    os.write(3, b'[4, 1]\\n[1, \"[4, 1]\"]\\n')\n    os._exit(0)"
    assert execution([forge, "def f(x): return 9"], [PLUS_ONE] * 2, seccomp=seccomp) == [0.0, 0.0]


def test_honest_programs_pass(seccomp):
    body = [
        "import json, datetime, decimal, hashlib, unicodedata, collections, random, statistics",
        "def f(x):",
        "    random.seed(1)",
        "    day = datetime.datetime.strptime('2024-02-28', '%Y-%m-%d')",
        "    try:",
        "        {}['a']",
        "    except KeyError as error:",
        "        print(repr(error))",
        "    return [",
        "        json.loads('[1]'), (day + datetime.timedelta(1)).isoformat(),",
        "        str(decimal.Decimal(1) / 3)[:6], hashlib.sha256(b'a').hexdigest()[:4],",
        "        '\\N{BULLET}', unicodedata.name('a'), statistics.mean([1, 2]),",
        "        'é'.encode('idna')[0], collections.Counter('aab').most_common(1),",
        "        sorted(random.sample(range(9), 9))[-1],",
        "    ]",
    ]
    result = [[1], "2024-02-29T00:00:00", "0.3333", "ca97", "\u2022", "LATIN SMALL LETTER A", 1.5]
    result += [120, [["a", 2]], 8]
    assert score("\n".join(body), [{"args": [0], "result": result}], seccomp=seccomp) == 1


def test_root_that_cannot_become_another_user_is_refused():
    """Only root is mapped in this user namespace."""
    probe = ["unshare", "--user", "--map-root-user"]
    if subprocess.run([*probe, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("user namespaces are not permitted here")
    request = '{"function": "f", "seccomp": true, "jobs": []}'
    done = subprocess.run(
        [*probe, sys.executable, "-I", "-S", code_sandbox.__file__],
        input=request,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert "generated code is never run as root" in done.stderr


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


def test_printed_output_is_discarded_and_changes_no_score(capfd):
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

    def dies_at_once(request):
        runs.append(len(request["jobs"]))
        return ([], {}) if len(runs) == 1 else real(request)

    monkeypatch.setattr(metrics, "_run_sandbox", dies_at_once)
    assert execution([GOOD] * 3, [PLUS_ONE] * 3) == [0.0, 1.0, 1.0]
    assert runs == [3, 2]


def test_a_sandbox_that_does_not_start_is_an_error(monkeypatch):
    with pytest.raises(RuntimeError, match="a correct function fails under the limits"):
        score(GOOD, function="no name")
    assert metrics.check_sandbox() is None
    real = metrics._run_sandbox
    monkeypatch.setattr(metrics, "_run_sandbox", lambda *_: ([], {}))
    assert "neither namespaces nor seccomp" in str(metrics.check_sandbox())
    monkeypatch.setattr(metrics, "_run_sandbox", real)
    monkeypatch.setattr(metrics, "_SANDBOX", Path("/none/sandbox.py"))
    with pytest.raises(BadInput, match=r"metric: execution: .* does not start"):
        metrics.check_sandbox()
    with pytest.raises(RuntimeError, match="does not start"):
        score(GOOD)
    assert execution([], []) == []
    with pytest.raises(ValueError, match="text 0 has no tests"):
        execution([GOOD], [[]])
