"""Run the program of one rank: log file, stop signals, and exit codes for exceptions."""

from __future__ import annotations

import os
import platform
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

from trainer.runtime import stop_signals
from trainer.runtime.console import Console
from trainer.runtime.errors import (
    EXIT_BAD_INPUT,
    EXIT_DONE,
    EXIT_FAILURE,
    EXIT_PORT_TAKEN,
    EXIT_RESUMABLE,
    BadInput,
    PortTaken,
)
from trainer.runtime.process import die_with_parent, flush_and_exit, mark_finished, rerun
from trainer.runtime.redact import printable, redact
from trainer.runtime.stdio import claim

#: Returns the name of the newest checkpoint in an output folder, or None.
FindCheckpoint = Callable[[Path], str | None]


class HasOutputDir(Protocol):
    """The field of a run file that ``run_rank`` requires."""

    @property
    def output_dir(self) -> str: ...


Config = TypeVar("Config", bound=HasOutputDir)


def run_rank(
    read: Callable[[], Config],
    program: Callable[[Config, Console], None],
    *,
    resumes_from: FindCheckpoint | None = None,
    answers: bool = False,
) -> int:
    """Read the run file and run this rank's program with ``run_guarded``; return the exit code."""
    rank = int(os.environ.get("RANK", "0"))
    die_with_parent()
    try:
        config = read()
        logs = writable_folder(Path(config.output_dir)) / "logs"
    except BadInput as error:
        return report_bad_input(rank, error)
    run = partial(program, config)
    return run_guarded(rank, logs, run, resumes_from=resumes_from, answers=answers)


def report_bad_input(rank: int, error: BadInput) -> int:
    """Print problems before there is a log file; return the exit code."""
    # One rank per node prints, because a file may be missing on only one node.
    if os.environ.get("LOCAL_RANK", "0") == "0":
        node = "" if rank == 0 else f"{platform.node()}: "
        with suppress(OSError):  # stderr is closed
            for problem in error.problems:
                print(f"error: {node}{printable(redact(problem))}", file=sys.stderr)
    return EXIT_BAD_INPUT


def run_guarded(
    rank: int,
    logs: Path,
    program: Callable[[Console], None],
    *,
    resumes_from: FindCheckpoint | None = None,
    answers: bool = False,
) -> int:
    """Run this rank's program with library output in a log file; return the exit code.

    Args:
        resumes_from: finds the checkpoint from which a stopped program resumes. None: the program
            cannot resume.
        answers: reserve stdout for ``Console.answer``; all other output goes to stderr.
    """
    log = logs / f"rank-{rank}.log"
    out, err = claim(rank, log)
    console = Console(err if answers else out, err, log, answer=out, shown=rank == 0)
    started = time.time()
    try:
        # launch/ starts ranks with stop signals blocked
        stop_signals.install_handlers(
            lambda: flush_and_exit(_interrupted(logs, resumes_from, console))
        )
        program(console)
        if answers and out.problem:
            console.error(out.problem)
            return EXIT_FAILURE
        if rank == 0:
            mark_finished()
        return EXIT_DONE
    except KeyboardInterrupt:
        return _interrupted(logs, resumes_from, console)
    except BadInput as error:
        for problem in error.problems:
            console.error(problem)
            print(f"error: {printable(redact(problem))}", file=sys.stderr)  # for the log
        return EXIT_BAD_INPUT
    except PortTaken as error:
        console.note(str(error))
        return EXIT_PORT_TAKEN
    except Exception as error:
        traceback.print_exc()
        if stop_signals.interrupted():
            return _interrupted(logs, resumes_from, console)
        # When a signal stops one rank while loading, the connections of other ranks to it fail.
        loading = not stop_signals.deferred()
        if resumes_from is not None and loading and stop_signals.stopped_since(logs, started):
            return _stopped(resumes_from(logs.parent), console)
        console.failure(error)
        return EXIT_FAILURE


def _interrupted(logs: Path, resumes_from: FindCheckpoint | None, console: Console) -> int:
    """End the program after a stop signal to this rank; return the exit code."""
    stop_signals.ending()
    stop_signals.write_stop_file(logs)
    if resumes_from is not None:
        return _stopped(resumes_from(logs.parent), console)
    console.note("Stopped.")
    return EXIT_FAILURE


def _stopped(checkpoint: str | None, console: Console) -> int:
    if checkpoint is not None:
        console.note(f"Stopped. {rerun()} to resume from {checkpoint}.")
    else:
        console.note("Stopped before the first checkpoint. Rerun the command to start over.")
    return EXIT_RESUMABLE


def writable_folder(folder: Path) -> Path:
    """Create a folder if needed and return it; raises ``BadInput`` if it is not writable."""
    probe = folder / f".writable-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise BadInput(
            f"output_dir: cannot write to {str(folder)!r} ({error.strerror}); give another folder"
        ) from None
    return folder
