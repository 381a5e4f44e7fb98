"""``trainer RUN.yaml [key=value ...]``: the program of one rank.

Heavy libraries are imported inside functions, after the checks that do not need them, so that
errors in the run file are reported at once.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from trainer import config as run_file
from trainer.checkpointing.checkpoint_names import newest_checkpoint
from trainer.config import RunConfig
from trainer.runtime import stop_signals
from trainer.runtime.console import Console
from trainer.runtime.process import fast_imports, flush_and_exit
from trainer.runtime.rank_program import run_rank


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)

    def train(config: RunConfig, console: Console) -> None:
        console.verbose = args.verbose
        phase = console.phase("importing torch, transformers and deepspeed", announce=True)
        with phase, fast_imports():
            from trainer.run import train as train_run

        train_run(config, console, fresh=args.fresh, command=shown_command(args))

    def resumes_from(output: Path) -> str | None:
        from trainer.checkpointing.output_folder import was_archived

        if args.fresh and not stop_signals.deferred() and not was_archived(output):
            return None  # the checkpoints are of the earlier run, which is archived after loading
        return newest_checkpoint(output)

    return run_rank(
        lambda: run_file.load(args.run, args.overrides), train, resumes_from=resumes_from
    )


def shown_command(args: argparse.Namespace) -> str:
    """Return the command line that ``environment.json`` records."""
    return f"deepspeed --module trainer {shlex.join([args.run, *args.overrides])}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="deepspeed --module trainer",
        description="Train the prompts of a run file. `promptshard train` starts this everywhere. "
        "Started by hand, Python imports from the working directory first: do not do that in a "
        "folder with other modules, such as trainer/ or json.py.",
    )
    parser.add_argument("run", metavar="RUN.yaml")
    parser.add_argument("overrides", metavar="key=value", nargs="*")
    parser.add_argument(
        "--fresh", action="store_true", help="start over; move an earlier run out of the way"
    )
    parser.add_argument(
        "--verbose", action="store_true", help="print every prompt at every validation, and details"
    )
    parser.add_argument("--local_rank", type=int, help="given by the launcher; not used")
    return parser


if __name__ == "__main__":
    flush_and_exit(main())
