"""Files in the working directory do not replace modules of a started process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.runtime import bootstrap

#: Modules that a process imports at once, and packages of ours.
DECOYS = ("json", "argparse", "runpy", "signal", "contextlib", "trainer", "launch")
PROGRAM = """\
import json, os, signal, sys
from trainer.runtime import redact
print(json.dumps([sys.argv, sys.path, redact.__file__, os.getcwd()]))
"""


@pytest.fixture
def decoys(tmp_path: Path) -> Path:
    """A working directory whose files record that they were imported."""
    folder = tmp_path / "work"
    folder.mkdir()
    for name in DECOYS:
        (folder / f"{name}.py").write_text(f"open({str(folder / 'ran')!r}, 'a').write('{name} ')\n")
    (tmp_path / "program.py").write_text(PROGRAM)
    return folder


def start(
    folder: Path, *words: str, path: list[str] | None = None, **variables: str
) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path is not None:
        variables["PYTHONPATH"] = os.pathsep.join(path)
    return subprocess.run(
        # -S: an editable install imports modules of Python before our first line.
        [sys.executable, "-S", bootstrap.FILE, *words],
        cwd=folder,
        env=kept | variables,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize("linked", [False, True])
def test_files_in_the_working_directory_shadow_no_module(decoys, linked, monkeypatch):
    """Nor as an empty entry of PYTHONPATH, as ``PYTHONPATH=$PYTHONPATH:/x`` makes one."""
    if linked:  # as /home may be a link
        (decoys.parent / "link").symlink_to(bootstrap.ROOT)
        monkeypatch.setattr(bootstrap, "FILE", f"{decoys.parent}/link/trainer/runtime/bootstrap.py")
    done = start(decoys, "program", "a", "--b", path=["", str(decoys.parent)])
    assert done.returncode == 0, done.stderr
    argv, path, module, where = json.loads(done.stdout)
    assert argv[1:] == ["a", "--b"]
    assert (
        Path(module).resolve() == Path(bootstrap.ROOT, "trainer", "runtime", "redact.py").resolve()
    )
    assert where == str(decoys)
    assert not {str(decoys), str(Path(bootstrap.FILE).parent), ""} & set(path)
    assert str(Path(bootstrap.FILE).resolve().parent) not in map(os.path.realpath, path)
    assert not (decoys / "ran").exists()


@pytest.mark.parametrize("length", [1, 300_000])
def test_arguments_in_the_environment_and_another_folder(decoys, length):
    """Linux refuses a variable of more than 128 KiB."""
    arguments = ["r.yaml", "a=\u00fc '$x'", "\u4f60" * length]
    given = bootstrap.arguments_in_environment(arguments)
    words = ["--arguments-in-environment", f"--chdir={decoys.parent}", "program"]
    done = start(decoys, *words, path=[str(decoys.parent)], **given)
    assert done.returncode == 0, done.stderr
    argv, _, _, where = json.loads(done.stdout)
    assert (argv[1:], where) == (arguments, str(decoys.parent))


@pytest.mark.parametrize("kind", ["file", "package"])
def test_another_package_named_trainer_is_refused(tmp_path, kind):
    ran = tmp_path / "ran"
    path = tmp_path / ("trainer.py" if kind == "file" else "trainer/__init__.py")
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"open({str(ran)!r}, 'w')\nraise SystemExit(0)\n")
    command = Path(bootstrap.ROOT, "launch", "__main__.py")
    for words in ([bootstrap.FILE, "trainer"], [str(command), "validate", "r.yaml"]):
        done = subprocess.run(
            [sys.executable, *words],
            # As in an installation, the folder of our package comes after the other one's.
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), bootstrap.ROOT])},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith(f"error: 'import trainer' finds {path}")
    assert not ran.exists()


#: A parent that starts a process and dies; ``late``: before the process could ask for a signal.
PARENT = """\
import os, signal, subprocess, sys
from trainer.runtime import bootstrap
pid = str(os.getpid()) if sys.argv[1] == "soon" else "1"
command = bootstrap.command("sleeper", "--parent-death=SIGTERM")
child = subprocess.Popen(
    command, env=os.environ | {bootstrap.PARENT: pid}, pass_fds=[int(sys.argv[3])]
)
if sys.argv[1] == "soon":
    os.read(int(sys.argv[2]), 1)
    os.kill(os.getpid(), signal.SIGKILL)
child.wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux sends the signal")
@pytest.mark.parametrize("when", ["soon", "late"])
def test_child_processes_end_with_their_parent(tmp_path, when):
    """However that one ends, and also if it has ended before."""
    reading, writing = os.pipe()
    (tmp_path / "sleeper.py").write_text(
        f"import os, time\nos.write({writing}, b'x')\ntime.sleep(300)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", PARENT, when, str(reading), str(writing)],
        cwd=bootstrap.ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,  # read to its end: until the child, which has it too, is gone
        pass_fds=[reading, writing],
        timeout=60,
    )
    os.close(reading)
    os.close(writing)
    assert done.returncode == (-9 if when == "soon" else 0)


def test_ctrl_c_prints_no_traceback(decoys):
    (decoys.parent / "program.py").write_text("import os\nos.kill(os.getpid(), 2)\n")
    code = (
        "import signal, runpy, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "sys.argv = ['bootstrap', 'program']\n"
        f"runpy.run_path({bootstrap.FILE!r}, run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=decoys,
        env={**os.environ, "PYTHONPATH": str(decoys.parent), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (130, "")


@pytest.mark.parametrize(("given", "expected"), [({}, "0"), ({"USE_HUB_KERNELS": "1"}, "1")])
def test_transformers_uses_no_kernels_of_the_hub(
    decoys: Path, given: dict[str, str], expected: str
) -> None:
    """Unless the user asks for them: functions of transformers would become modules."""
    (decoys.parent / "program.py").write_text("import os; print(os.environ['USE_HUB_KERNELS'])")
    done = start(decoys, "program", path=[str(decoys.parent)], **given)
    assert done.stdout.strip() == expected, done.stderr
