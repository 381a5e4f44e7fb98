"""``python -m trainer.commands.predict RUN_DIR``: the program of ``promptshard predict``.

Started on every rank, because the base model is sharded.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from trainer.commands.predict.plan import parse
from trainer.runtime.console import Console
from trainer.runtime.log_folder import inference_logs
from trainer.runtime.process import die_with_parent, fast_imports, flush_and_exit
from trainer.runtime.rank_program import run_guarded


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    die_with_parent()

    def program(console: Console) -> None:
        phase = console.phase("importing torch, transformers and deepspeed", announce=True)
        with phase, fast_imports():
            from trainer.commands.predict.program import run_predict
        run_predict(options, console)

    return run_guarded(
        int(os.environ.get("RANK", "0")),
        inference_logs(options.run_dir),
        program,
        resumes_from=lambda folder: "the rows that have been predicted",
    )


if __name__ == "__main__":
    flush_and_exit(main())
