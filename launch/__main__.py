"""Entry point of ``promptshard``: set up signals, import path and streams, then run a command."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, ModuleType
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class Interrupted(BaseException):
    """A stop signal arrived while no ranks were running."""


def main() -> None:
    """Run the command of the command line and end with its exit code."""
    _raise_on_stop_signals()
    try:
        try:
            _run()
        finally:
            _ignore_stop_signals()
    except Interrupted:
        _ignore_stop_signals()
        sys.stderr.write("Stopped. Rerun the command.\n")
        sys.exit(os.EX_TEMPFAIL)  # trainer.runtime.errors.EXIT_RESUMABLE


def _run() -> None:
    bootstrap = _bootstrap()
    bootstrap.clean_path()
    if problem := bootstrap.foreign_package():
        sys.exit(bootstrap.refuse(problem))

    from trainer.runtime.stdio import keep_streams, lost_output

    keep_streams()

    from launch import messages
    from launch.commands import app
    from trainer.runtime.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILURE, BadInput

    try:
        check_arguments(sys.argv)
        app(prog_name="promptshard")
    except BadInput as error:
        messages.problems(error.problems)
        sys.exit(EXIT_BAD_INPUT)
    except SystemExit as ended:
        lost = lost_output()
        if ended.code or not lost or has_other_result(sys.argv[1:]):
            raise
        messages.failure(lost)
        sys.exit(EXIT_FAILURE)
    sys.exit(EXIT_DONE)


def has_other_result(arguments: Sequence[str]) -> bool:
    """Whether a command has done its work even if its output is lost.

    If a caller repeated it because of an exit code, there would be a second run or job.
    """
    return arguments[:1] == ["train"] or (
        arguments[:1] == ["submit"] and "--dry-run" not in arguments
    )


def check_arguments(arguments: Sequence[str]) -> None:
    """Raise ``BadInput`` for arguments that are not UTF-8 or a deleted working directory."""
    from trainer.runtime.errors import BadInput

    try:
        os.getcwd()
    except OSError:
        raise BadInput("the working directory is deleted; change to another one") from None
    if any("\ud800" <= letter <= "\udfff" for word in arguments for letter in word):
        raise BadInput("an argument is not UTF-8; rename the file, or set LANG to a UTF-8 one")


def _bootstrap() -> ModuleType:
    """Load this project's ``bootstrap.py``, even if ``import trainer`` finds another package."""
    path = Path(__file__).resolve().parent.parent / "trainer" / "runtime" / "bootstrap.py"
    spec = importlib.util.spec_from_file_location("_promptshard_bootstrap", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _raise_on_stop_signals() -> None:
    """Raise ``Interrupted`` for stop signals, except for those that the caller ignores."""

    def stop(_: int, __: FrameType | None) -> NoReturn:
        raise Interrupted

    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, stop)


def _ignore_stop_signals() -> None:
    """Ignore stop signals while Python exits, so that they cannot change the exit code."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    main()
