"""Run ranks on several hosts over ssh, with the DeepSpeed launcher's runner."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from launch import messages
from launch.exit_report import ExitReport, describe
from launch.launcher_process import GRACE_SECONDS, StopSignals, guarded, signal_group, start, wait
from trainer.runtime import bootstrap
from trainer.runtime.process import START_OPTIONS
from trainer.runtime.redact import redact

STOP_SECONDS = 30.0  # for the launcher to stop the ranks of other hosts over ssh
CHATTER = re.compile(r"^(\S+: )?\[\d{4}-\d\d-\d\d [\d:,]+\] \[[A-Z]+\] \[")


def run(command: Sequence[str], environment: Mapping[str, str], log: Path) -> ExitReport:
    """Run the launcher on several hosts; its log lines go to ``log``, other output to stdout."""
    stop = StopSignals()
    with (
        tempfile.TemporaryDirectory(prefix="promptshard-") as folder,
        log.open("w") as chatter,
        stop.listening(),
    ):
        process = start(
            command,
            cwd=bootstrap.ROOT,
            env=_exported(environment, Path(folder)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            start_new_session=True,
            text=True,
            errors="replace",
        )
        assert process.stdout is not None
        sorter = threading.Thread(target=_sort_lines, args=(process.stdout, chatter, sys.stdout))
        sorter.start()
        with guarded(process.pid):
            # the runner's signal handler stops the ranks of all hosts
            wait(process, stop, lambda _: process.send_signal(signal.SIGTERM), STOP_SECONDS)
            if stop.signals:
                signal_group(process.pid, signal.SIGKILL)
        sorter.join(timeout=GRACE_SECONDS)
    return describe(process.returncode, stop.signals, log, lost=False, resumable=True)


def _exported(environment: Mapping[str, str], folder: Path) -> dict[str, str]:
    """Return the launcher's environment, without secrets that ssh would show to other users.

    The launcher reads ``.deepspeed_env`` in its own working directory, so the user's files are
    merged into one. The launcher also passes MLflow variables on command lines, which every user of
    a host can read.
    """
    result = dict(environment)
    name = result.get("DS_ENV_FILE", ".deepspeed_env")
    texts = [
        path.read_text().rstrip("\n")
        for path in (Path.home() / name, Path(name).absolute())
        if path.is_file()
    ]
    merged = folder / "deepspeed_env"
    options = environment.get(START_OPTIONS)
    # The launcher writes values into a shell command, in double quotes.
    if options is not None and re.fullmatch(r"[\w@+=:,./\-' ]*", options):
        texts.append(f"{START_OPTIONS}={options}")
    merged.write_text("".join(f"{text}\n" for text in texts if text))
    result["DS_ENV_FILE"] = str(merged)
    secrets = [
        name
        for name, value in result.items()
        if name in ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
        or (name.startswith("MLFLOW") and redact(value) != value)
    ]
    for name in secrets:
        del result[name]
    if secrets:
        messages.note(
            f"not passed over ssh, where every user could read it: {', '.join(secrets)}; set it on "
            "the first host, or upload at the end with promptshard sync"
        )
    return result


def _sort_lines(source: IO[str], chatter: IO[str], terminal: IO[str]) -> None:
    for line in source:
        stream = chatter if CHATTER.match(line) else terminal
        stream.write(line)
        stream.flush()
