"""``python -m trainer.commands.generate RUN_DIR --prompt NAME --input TEXT``: generate one text.

Only the text goes to stdout; progress and warnings go to stderr. Like training, the program runs on
every rank, because the base model is sharded.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from trainer.inference.saved_run import open_run
from trainer.runtime.console import Console
from trainer.runtime.log_folder import inference_logs
from trainer.runtime.process import die_with_parent, fast_imports, flush_and_exit
from trainer.runtime.rank_program import run_guarded


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    die_with_parent()
    folder = Path(args.run_dir)

    def program(console: Console) -> None:
        _generate(folder, args.prompt, args.input, args.max_new_tokens, console)

    rank = int(os.environ.get("RANK", "0"))
    return run_guarded(rank, inference_logs(folder), program, answers=True)


def _generate(
    folder: Path, name: str, text: str, max_new_tokens: int | None, console: Console
) -> None:
    run = open_run(folder)
    (prompt,) = run.selected([name])
    phase = console.phase("importing torch, transformers and deepspeed", announce=True)
    with phase, fast_imports():
        from trainer.api import base_digests
        from trainer.inference.engine import close_engine, open_engine
        from trainer.inference.opened_base import open_inference_base
        from trainer.inference.requests import RequestNames

    engine = open_engine(run.config.engine.timeout_seconds)
    digests = engine.run_on_main(lambda: base_digests(run.folder))
    opened = open_inference_base(engine, run, console, prompts=[prompt], digests=digests)
    names = RequestNames("--input", "--max-new-tokens")
    request = engine.run_on_all(lambda: opened.text_request(text, prompt, max_new_tokens, names))
    base = opened.load(console)
    (answer,) = base.generate_requests([request])
    console.answer(answer)
    close_engine(engine)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="deepspeed --module trainer.commands.generate")
    parser.add_argument("run_dir", metavar="RUN_DIR")
    parser.add_argument("--prompt", required=True, metavar="NAME")
    fills = "fills the template if that has one column"
    parser.add_argument("--input", required=True, metavar="TEXT", help=fills)
    parser.add_argument("--max-new-tokens", type=int, metavar="N")
    parser.add_argument("--local_rank", type=int, help="given by the launcher; not used")
    return parser


if __name__ == "__main__":
    flush_and_exit(main())
