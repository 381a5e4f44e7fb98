"""``python -m trainer.commands.lint RUN.yaml``: the program of ``promptshard lint --measure``.

Started on every rank, because the base model is sharded.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from trainer.commands.lint.options import parse, results_folder
from trainer.config import load
from trainer.runtime.console import Console
from trainer.runtime.errors import BadInput
from trainer.runtime.process import die_with_parent, fast_imports, flush_and_exit
from trainer.runtime.rank_program import report_bad_input, run_guarded


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    die_with_parent()
    rank = int(os.environ.get("RANK", "0"))
    try:
        config = load(options.run_file, options.overrides)
    except BadInput as error:
        return report_bad_input(rank, error)

    def program(console: Console) -> None:
        phase = console.phase("importing torch, transformers and deepspeed", announce=True)
        with phase, fast_imports():
            from trainer.commands.lint.program import measure
        measure(options, config, console)

    return run_guarded(
        rank,
        results_folder(config.output_dir) / "logs",
        program,
        resumes_from=lambda folder: "the rows that have been scored",
        answers=True,
    )


if __name__ == "__main__":
    flush_and_exit(main())
