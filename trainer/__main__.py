"""``trainer RUN.yaml [key=value ...]``: the program that one rank runs.

Heavy libraries are imported inside functions, after the checks that need none of them, so that bad
input is answered at once.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from trainer import config as run_file
from trainer import stop
from trainer.config import RunConfig
from trainer.console import Console
from trainer.errors import (
    EXIT_BAD_INPUT,
    EXIT_DONE,
    EXIT_FAILURE,
    EXIT_PORT_TAKEN,
    EXIT_RESUMABLE,
    BadInput,
    PortTaken,
)
from trainer.names import checkpoint_names
from trainer.process import die_with_parent, leave, mark_finished
from trainer.redact import printable, redact
from trainer.terminal import claim


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)

    def train(config: RunConfig, console: Console) -> None:
        with console.phase("importing torch, transformers and deepspeed", announce=True):
            from trainer.run import train as train_run

        train_run(config, console, fresh=args.fresh, command=shown_command(args))

    return run_rank(lambda: run_file.load(args.run, args.overrides), train, resumable=True)


def run_rank(
    read: Callable[[], RunConfig],
    program: Callable[[RunConfig, Console], None],
    *,
    resumable: bool = False,
    answers: bool = False,
) -> int:
    """Read the run file, then run this rank's program on it; gives the exit code.

    Args:
        resumable, answers: as in ``guarded``.
    """
    rank = int(os.environ.get("RANK", "0"))
    die_with_parent()
    try:
        config = read()
        logs = writable(Path(config.output_dir)) / "logs"
    except BadInput as error:
        return refused(rank, error)
    return guarded(
        rank,
        logs,
        lambda console: program(config, console),
        resumable=resumable,
        answers=answers,
    )


def refused(rank: int, error: BadInput) -> int:
    """Print what is wrong before there is a log; gives the exit code."""
    # One rank of every node, as a file can be missing on one node alone.
    if os.environ.get("LOCAL_RANK", "0") == "0":
        node = "" if rank == 0 else f"{platform.node()}: "
        with suppress(OSError):  # nobody reads it
            for problem in error.problems:
                print(f"error: {node}{printable(redact(problem))}", file=sys.stderr)
    return EXIT_BAD_INPUT


def guarded(
    rank: int,
    logs: Path,
    program: Callable[[Console], None],
    *,
    resumable: bool = False,
    answers: bool = False,
) -> int:
    """Run this rank's program with its chatter in a log; turn what it raises into an exit code.

    Args:
        resumable: a program that was stopped resumes from its newest checkpoint.
        answers: stdout is for ``Console.answer`` alone; all other output goes to stderr.
    """
    log = logs / f"rank-{rank}.log"
    terminal = claim(rank, log)
    out = terminal.err if answers else terminal.out
    console = Console(out, terminal.err, log, answer=terminal.out, shown=rank == 0)
    began = time.time()
    try:
        stop.listen()  # launch/ starts us with stop signals blocked
        program(console)
        if rank == 0:
            mark_finished()
        return EXIT_DONE
    except KeyboardInterrupt:
        stop.tell_others(logs)
        if resumable:
            return _stopped(logs.parent, console)
        console.note("Stopped.")
        return EXIT_FAILURE
    except BadInput as error:
        for problem in error.problems:
            console.error(problem)
        return EXIT_BAD_INPUT
    except PortTaken as error:
        console.note(str(error))
        return EXIT_PORT_TAKEN
    except Exception as error:
        traceback.print_exc()
        if resumable and stop.told(logs, began):  # the connection to that rank is lost
            return _stopped(logs.parent, console)
        console.failure(error)
        return EXIT_FAILURE


def _stopped(output: Path, console: Console) -> int:
    """Print how to resume a run that was stopped; gives its exit code."""
    saved = checkpoint_names(output)
    if saved:
        console.note(f"Stopped. Rerun the command to resume from {saved[-1]}.")
    else:
        console.note("Stopped before the first checkpoint. Rerun the command to start over.")
    return EXIT_RESUMABLE


def writable(folder: Path) -> Path:
    """The folder, made if need be.

    Raises:
        BadInput: if nothing can be written there.
    """
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


def shown_command(args: argparse.Namespace) -> str:
    return " ".join(["deepspeed --module trainer", args.run, *args.overrides])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="deepspeed --module trainer",
        description="Train the prompts of a run file. `promptshard train` starts this everywhere. "
        "Started by hand, Python imports from the working directory first: do not do that in a "
        "folder that has modules of its own, such as trainer/ or json.py.",
    )
    parser.add_argument("run", metavar="RUN.yaml")
    parser.add_argument("overrides", metavar="key=value", nargs="*")
    parser.add_argument(
        "--fresh", action="store_true", help="start over; move an earlier run out of the way"
    )
    parser.add_argument("--local_rank", type=int, help="given by the launcher; not used")
    return parser


if __name__ == "__main__":
    leave(main())
