"""Start ``python -m MODULE`` in processes that have torch, transformers and deepspeed imported.

These imports take a rank five seconds of CPU time, which is more than most tests of ranks need for
everything else. A server (multiprocessing's forkserver, one per pytest worker) imports once and
forks for every rank. Each rank is a process of its own, with its own environment, folder and logs.

Tests of the command line, of launchers and of what happens before these imports start interpreters.

The process that a run starts to send its metrics would import MLflow and create a store, which also
takes seconds. Only tests of MLflow start it (``mlflow=True``).
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from trainer.runtime.process import WAITING_THREADS, die_with_parent

ROOT = Path(__file__).resolve().parents[1]


@functools.cache
def _server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preload"])
    own = {"PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    own |= WAITING_THREADS  # read when torch is imported
    with patch.dict(os.environ, own):
        forkserver.ensure_running()
    return context


class Process:
    """A started process, with the methods and exit codes of ``subprocess.Popen``."""

    def __init__(self, process: Any) -> None:
        self._process = process

    @property
    def pid(self) -> int:
        return int(self._process.pid)

    def poll(self) -> int | None:
        return self._process.exitcode  # type: ignore[no-any-return]

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if (code := self.poll()) is None:
            raise subprocess.TimeoutExpired(str(self._process), timeout or 0)
        return code

    def kill(self) -> None:
        if self._process.is_alive():
            self._process.kill()


def start(
    module: str,
    *arguments: str,
    environ: Mapping[str, str],
    stdout: Path,
    stderr: Path | None,
    mlflow: bool = False,
    cwd: Path = ROOT,
) -> Process:
    """Start ``python -m MODULE ARGUMENTS``.

    Args:
        environ: the whole environment of the process.
        stdout, stderr: files, which may be the same; None: stderr goes to ``stdout`` too.
        cwd: the working directory.
        mlflow: send metrics to MLflow; otherwise a process that sends nothing reports success.
    """
    work = (module, arguments, dict(environ), str(stdout), str(stderr or stdout), mlflow, str(cwd))
    process = _server().Process(target=_run, args=work, daemon=True)
    process.start()
    return Process(process)


def run(
    module: str,
    *arguments: str,
    environ: Mapping[str, str],
    timeout: float = 400,
    mlflow: bool = False,
    cwd: Path = ROOT,
) -> subprocess.CompletedProcess[str]:
    """Start a process, wait for its end and read its output."""
    with tempfile.TemporaryDirectory() as folder:
        stdout, stderr = Path(folder, "stdout"), Path(folder, "stderr")
        process = start(
            *(module, *arguments),
            environ=environ,
            stdout=stdout,
            stderr=stderr,
            mlflow=mlflow,
            cwd=cwd,
        )
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
        return subprocess.CompletedProcess(
            [module, *arguments], code, stdout.read_text(), stderr.read_text()
        )


def _run(
    module: str,
    arguments: tuple[str, ...],
    environ: dict[str, str],
    stdout: str,
    stderr: str,
    mlflow: bool,
    cwd: str = str(ROOT),
) -> None:
    die_with_parent(signal.SIGKILL)  # the server, which ends with the tests
    multiprocessing.current_process()._config["daemon"] = False  # it may start processes itself
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(cwd)
    for descriptor, path in ((1, stdout), (2, stderr)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, descriptor)
        os.close(file)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]

    import torch

    threads = environ.get("OMP_NUM_THREADS")  # read by torch when it was imported
    torch.set_num_threads(int(threads) if threads else os.cpu_count() or 1)
    if not mlflow:
        _send_nothing()
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _send_nothing() -> None:
    """Replace the sender of metrics by a process that ends with the run, as if all were sent."""
    from trainer.tracking import process_client

    sender = [sys.executable, "-S", "-c", "import sys; sys.stdin.read()"]
    process_client.bootstrap = SimpleNamespace(command=lambda _: sender)  # type: ignore[assignment]
