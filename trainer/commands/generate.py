"""``python -m trainer.commands.generate RUN_DIR --prompt NAME --input TEXT``: generate one text.

Only the text goes to stdout; progress and warnings go to stderr. Like training, the program runs on
every rank, because the base model is sharded.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from trainer import config as run_file
from trainer.config import RunConfig
from trainer.data.tokenization.chat_template import read_chat_date
from trainer.runtime.console import Console
from trainer.runtime.errors import BadInput
from trainer.runtime.process import die_with_parent, flush_and_exit
from trainer.runtime.rank_program import run_guarded


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    die_with_parent()
    folder = Path(args.run_dir)

    def program(console: Console) -> None:
        config = run_file.load(folder / "run.yaml")
        _generate(config, folder, args.prompt, args.input, args.max_new_tokens, console)

    return run_guarded(int(os.environ.get("RANK", "0")), folder / "logs", program, answers=True)


def _generate(
    config: RunConfig,
    folder: Path,
    name: str,
    text: str,
    max_new_tokens: int | None,
    console: Console,
) -> None:
    with console.phase("importing torch, transformers and deepspeed", announce=True):
        from trainer.data.tokenization.tokenize import encode_request
        from trainer.distributed.deepspeed_engine import Engine
        from trainer.distributed.model_loading import load_base, open_base_on_all
        from trainer.evaluation.generation import generate
        from trainer.evaluation.stop_criteria import StopCriteria
        from trainer.prompts.peft_adapter import load_peft

    prompt = next((prompt for prompt in config.prompts if prompt.name == name), None)
    if prompt is None:
        known = ", ".join(prompt.name for prompt in config.prompts)
        raise BadInput(f"--prompt: {folder} has no prompt {name!r}; known: {known}")
    task = config.task(prompt.task)

    engine = Engine(config.engine.timeout_seconds)
    files = open_base_on_all(engine, config.base, console)
    input_ids, prompt_at = encode_request(
        *(files.tokenizer, task, text), position=prompt.position, date=read_chat_date(folder)
    )
    limit = max_new_tokens or task.max_new_tokens
    room = files.context_length - prompt.num_virtual_tokens - limit
    if room < 1:
        raise BadInput(
            f"--max-new-tokens: {limit} leaves no room for an input in the context of "
            f"{files.context_length} tokens; lower it"
        )
    if not 0 < len(input_ids) <= room:
        raise BadInput(
            f"--input: has {len(input_ids)} tokens, but must have 1 to {room}, because {limit} new "
            "ones follow; shorten it or lower --max-new-tokens"
        )
    virtual_tokens = load_peft(folder / "prompts" / name).to(engine.device)
    loaded = load_base(engine, files, config, console)
    stop = StopCriteria.of(files.generation, files.tokenizer, task)
    (generated,) = generate(
        *(engine, loaded.model, stop, [input_ids], virtual_tokens, limit), prompt_at=[prompt_at]
    )
    console.answer(stop.text(generated.ids, skip_special_tokens=True).strip())
    engine.close()


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
