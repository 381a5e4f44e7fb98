"""``python -m trainer RUN.yaml [key=value ...]``: the program that one rank runs.

Wires the parts in the order of the data. Imports of heavy libraries stand inside functions, behind
the checks that need none of them: bad input answers in a moment.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from trainer import config as run_file
from trainer import stop
from trainer.config import RunConfig
from trainer.console import Console
from trainer.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILURE, EXIT_RESUMABLE, BadInput
from trainer.names import checkpoint_names
from trainer.process import die_with_parent, leave
from trainer.terminal import claim


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)

    def train(config: RunConfig, console: Console) -> None:
        with console.phase("importing torch, transformers and deepspeed"):
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
    """Say what is wrong before there is a log; gives the exit code."""
    # One rank of every node, as a file can be missing on one node alone.
    if os.environ.get("LOCAL_RANK", "0") == "0":
        node = "" if rank == 0 else f"{platform.node()}: "
        for problem in error.problems:
            print(f"error: {node}{problem}", file=sys.stderr)
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
    try:
        stop.listen()  # launch/ starts us with stop signals blocked
        program(console)
        return EXIT_DONE
    except KeyboardInterrupt:
        if resumable:
            return _stopped(logs.parent, console)
        console.error("stopped")
        return EXIT_FAILURE
    except BadInput as error:
        for problem in error.problems:
            console.error(problem)
        return EXIT_BAD_INPUT
    except Exception as error:
        traceback.print_exc()
        console.failure(error)
        return EXIT_FAILURE


def _stopped(output: Path, console: Console) -> int:
    """What a run that was told to stop leaves behind, and its exit code."""
    saved = checkpoint_names(output)
    if saved:
        console.error(f"stopped; the same command goes on from {saved[-1]}")
    else:
        console.error("stopped before the first checkpoint; the same command begins anew")
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
        description="Train the prompts of a run file. `promptshard train` starts this everywhere.",
    )
    parser.add_argument("run", metavar="RUN.yaml")
    parser.add_argument("overrides", metavar="key=value", nargs="*")
    parser.add_argument(
        "--fresh", action="store_true", help="put an earlier run aside instead of going on with it"
    )
    parser.add_argument("--local_rank", type=int, help="given by the launcher; not used")
    return parser


if __name__ == "__main__":
    leave(main())
