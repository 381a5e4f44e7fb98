"""``python -m trainer.commands.inspect_prompts RUN_DIR``: the program of ``promptshard inspect``.

Started on every rank, because the base model is sharded.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from trainer.commands.inspect_prompts.options import parse
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
        run = options.selected_run()
    except BadInput as error:
        return report_bad_input(rank, error)

    def program(console: Console) -> None:
        phase = console.phase("importing torch, transformers and deepspeed", announce=True)
        with phase, fast_imports():
            from trainer.commands.inspect_prompts.program import inspect
        inspect(options, run, console)

    logs = measurements_folder(options.run_dir) / "logs"
    return run_guarded(rank, logs, program, answers=options.json == "-")


if __name__ == "__main__":
    flush_and_exit(main())
