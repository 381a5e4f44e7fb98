"""``python -m trainer.commands.evaluate RUN_DIR``: the program of ``promptshard evaluate``.

Started on every rank, because the base model is sharded.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from trainer.commands.evaluate.options import parse
from trainer.commands.evaluate.selection import selected_run
from trainer.runtime.console import Console
from trainer.runtime.errors import BadInput
from trainer.runtime.log_folder import measurements_folder
from trainer.runtime.process import die_with_parent, fast_imports, flush_and_exit
from trainer.runtime.rank_program import report_bad_input, run_guarded


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    die_with_parent()
    rank = int(os.environ.get("RANK", "0"))
    try:
        run = selected_run(options)
    except BadInput as error:
        return report_bad_input(rank, error)

    def program(console: Console) -> None:
        phase = console.phase("importing torch, transformers and deepspeed", announce=True)
        with phase, fast_imports():
            from trainer.commands.evaluate.program import evaluate
        evaluate(options, run, console)

    return run_guarded(
        rank,
        measurements_folder(options.run_dir) / "logs",
        program,
        resumes_from=lambda folder: "the rows that have been scored",
        answers=options.json == "-",
    )


if __name__ == "__main__":
    flush_and_exit(main())
