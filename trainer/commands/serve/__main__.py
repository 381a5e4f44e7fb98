"""``python -m trainer.commands.serve RUN_DIR``: the program of ``promptshard serve``.

Started on every rank, because the base model is sharded.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from trainer.commands.serve.options import TOKEN_VARIABLE, parse
from trainer.inference.saved_run import open_run
from trainer.runtime.console import Console
from trainer.runtime.errors import BadInput
from trainer.runtime.log_folder import inference_logs
from trainer.runtime.process import die_with_parent, fast_imports, flush_and_exit
from trainer.runtime.rank_program import report_bad_input, run_guarded


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    die_with_parent()
    rank = int(os.environ.get("RANK", "0"))
    try:
        token = options.read_token() if rank == 0 else None
        run = open_run(options.run_dir)
        chosen = run.selected(options.prompts)
    except BadInput as error:
        return report_bad_input(rank, error)
    os.environ.pop(TOKEN_VARIABLE, None)

    def program(console: Console) -> None:
        phase = console.phase("importing torch, transformers and deepspeed", announce=True)
        with phase, fast_imports():
            from trainer.commands.serve.program import serve
        serve(options, run, chosen, token, console)

    return run_guarded(rank, inference_logs(options.run_dir), program)


if __name__ == "__main__":
    flush_and_exit(main())
