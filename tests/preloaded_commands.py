"""Run a command of ``promptshard`` in a folder, with torch, transformers and deepspeed imported.

The command is a process of its own (tests/preloaded.py). The processes that it starts (a rank, the
launcher, the launcher's ranks) are forks, not new interpreters that import these libraries again.
Each has the environment, arguments and streams that a new interpreter would get.

    preloaded.run("tests.preloaded_commands", COMMAND, *ARGUMENTS, cwd=FOLDER, environ=...)
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from launch import launcher_process
from tests import preloaded
from trainer.runtime import bootstrap

#: The settings of ``subprocess.Popen`` that a fork follows.
KNOWN = {"env", "stdin", "stdout", "start_new_session"}
POPEN = subprocess.Popen
#: They start without torch, which only a new interpreter can.
WITHOUT_TORCH = {"trainer.commands.check_rows", "trainer.commands.plan"}


class Fork(preloaded.Process):
    """A fork of this process, with what launch/ uses of ``subprocess.Popen``."""

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def terminate(self) -> None:
        self._process.terminate()


def start(command: Sequence[str], **settings: Any) -> Fork | subprocess.Popen[Any]:
    """``subprocess.Popen``, with a fork for each process that starts with ``bootstrap.py``."""
    words = [word for word in command[1:] if word != "-u"]
    if words[:1] != [bootstrap.FILE] or WITHOUT_TORCH & {*words}:
        return POPEN(command, **settings)
    assert settings.keys() <= KNOWN, settings
    process = multiprocessing.get_context("fork").Process(target=_run, args=(words, settings))
    sys.stdout.flush()
    process.start()
    return Fork(process)


def _run(words: list[str], settings: dict[str, Any]) -> None:
    for number in launcher_process.STOPPING:
        if callable(signal.getsignal(number)):  # a new program has none of its parent's handlers
            signal.signal(number, signal.SIG_DFL)
    if settings.get("start_new_session"):
        os.setsid()
    streams = [
        (settings[name], i) for i, name in enumerate(("stdin", "stdout")) if name in settings
    ]
    copies = [(os.dup(s if isinstance(s, int) else s.fileno()), number) for s, number in streams]
    for copy, number in copies:
        os.dup2(copy, number)
        os.close(copy)
    os.environ.clear()
    os.environ.update(settings["env"])

    import torch

    threads = os.environ.get("OMP_NUM_THREADS")  # read by torch when it was imported
    torch.set_num_threads(int(threads) if threads else os.cpu_count() or 1)
    if "launch.local_launcher" in words:
        subprocess.Popen = start  # type: ignore[assignment,misc]
    sys.argv = words
    bootstrap.main()


if __name__ == "__main__":
    launcher_process.start = start  # type: ignore[assignment]
    runpy.run_module("launch", run_name="__main__", alter_sys=True)
