"""Rank program: nine prompts trained in one bank over a sharded base, and each of them alone.

python -m tests.distributed.bank OUT.json BASE ROWS
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from tests.distributed.sharded_base import run_config, shard_base
from tests.family_bases import errors
from trainer.config import RunConfig
from trainer.data.task_data import TaskData, load_tasks
from trainer.distributed.deepspeed_engine import Engine
from trainer.evaluation.evaluator import Evaluator
from trainer.model.checkpoint_files import BaseFiles, open_base
from trainer.packing.activation_memory import TokenBudget
from trainer.packing.batch_source import BatchSource
from trainer.prompts.init_search import SearchResult
from trainer.runtime.console import Console
from trainer.runtime.process import flush_and_exit
from trainer.training.init_scoring import LossInitScorer
from trainer.training.initial_bank import make_bank
from trainer.training.step import step_gradients

STEPS, MAX_TOKENS, SEARCH_TOKENS = 4, 48, 400
READER = {"method": "p_tuning", "encoder": "text", "share": "reader", "num_virtual_tokens": 3}
#: Every method, several lengths, two tasks; one ends before the others, two share an encoder. Words
#: to start from are looked for where ``init`` is left out.
PROMPTS: list[dict[str, Any]] = [
    {"name": "words", "num_virtual_tokens": 4, "init": {"text": "w3 w5 w7"}},
    {"name": "open", "num_virtual_tokens": 4, "task": "y"},
    {"name": "text", **READER, "init": {"text": "w8 w5 w9 w4"}},
    {"name": "text-y", **READER, "init": {"text": "w6 w2"}, "task": "y"},
    {
        "name": "lstm",
        "method": "p_tuning",
        "encoder": "lstm",
        "num_virtual_tokens": 2,
        "task": "y",
        "max_grad_norm": None,
    },
    {"name": "brief", "method": "p_tuning", "num_virtual_tokens": 5, "steps": 2},
    {
        "name": "residual",
        "method": "p_tuning",
        "encoder": "residual",
        "init": "random",
        "num_virtual_tokens": 7,
        "task": "y",
        "seed": 3,
        "weight_decay": 0.1,
        "learning_rate": 0.01,
    },
    {"name": "prefix", "method": "prefix_tuning", "num_virtual_tokens": 4},
    {"name": "prefix-mlp", "method": "prefix_tuning", "num_virtual_tokens": 3, "encoder": "mlp"},
]
#: What is trained alone: a prompt, or all of a share.
ALONE = [
    [prompt for prompt in PROMPTS if key == prompt.get("share", prompt["name"])]
    for key in dict.fromkeys(prompt.get("share", prompt["name"]) for prompt in PROMPTS)
]


class RecordingScorer(LossInitScorer):
    """Record the tokens that the search chose, by prompt."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.words: dict[str, list[int]] = {}

    def say(self, i: int, result: SearchResult, text: str) -> None:
        self.words[self._names[i]] = list(result.words)


def main() -> None:
    out, folder, rows = sys.argv[1:]
    engine = Engine(120)
    loaded = shard_base(engine, run_config(folder, "int8"))
    base = engine.attach(loaded.model, loaded.policy)
    config = make_config(folder, rows, PROMPTS)
    files = open_base(config.base)
    tasks = load_tasks(config, files.tokenizer, files.context_length, files.config.vocab_size)
    together, starts, gathered = train(engine, base, files, tasks, config)
    alone: dict[str, Tensor] = {}
    starts_alone: dict[str, list[int]] = {}
    gathered_alone = 0
    for prompts in ALONE:
        config = make_config(folder, rows, prompts)
        trained, words, count = train(engine, base, files, tasks, config)
        starts_alone |= words
        alone |= {prompt["name"]: made for prompt, made in zip(prompts, trained, strict=True)}
        gathered_alone += count
    result = {
        "errors": {
            prompt["name"]: errors([made], [alone[prompt["name"]]])[0]
            for prompt, made in zip(PROMPTS, together, strict=True)
        },
        "starts": starts,
        "starts_alone": starts_alone,
        "gathered": gathered,
        "gathered_alone": gathered_alone,
    }
    if engine.is_main:
        Path(out).write_text(json.dumps(result))
    engine.close()


def make_config(folder: str, rows: str, prompts: list[dict[str, Any]]) -> RunConfig:
    return RunConfig.model_validate(
        {
            "output_dir": "-",
            "base": {"model": folder},
            "tasks": [
                {
                    "name": name,
                    "train": f"{rows}/{name}.jsonl",
                    "input": "{text}",
                    "target": " {label}",
                    "validation_share": 0,
                }
                for name in ("x", "y")
            ],
            "prompts": [{"task": "x", **prompt} for prompt in prompts],
            "training": {"steps": STEPS, "tokens_per_step": 60},
            "search": {"init_share": 5},  # 40 candidates: random ones, then three rounds
        }
    )


def train(
    engine: Engine,
    base: Any,
    files: BaseFiles,
    tasks: Mapping[str, TaskData],
    config: RunConfig,
) -> tuple[list[Tensor], dict[str, list[int]], int]:
    """Return virtual tokens after the last step, searched tokens, and bytes gathered by steps."""

    evaluator = Evaluator(engine, base, files.tokenizer, TokenBudget(SEARCH_TOKENS))
    console = Console(sys.stdout, sys.stderr)
    screen = RecordingScorer(config, tasks, evaluator, console)
    bank = make_bank(config, engine, base, files, screen, console.warn)
    feed, before = BatchSource(config, tasks), engine.gathered_bytes
    for step in range(STEPS):
        for k, prompt in enumerate(config.prompts):
            if bank.active[k] and step == config.prompt_steps(prompt):
                bank.stop(k)
        if any(bank.active):
            packed_rows, prompts = feed.next_step(bank.active), bank.virtual_tokens()
            bank.update(step_gradients(engine, base, packed_rows, prompts, MAX_TOKENS).gradients)
    gathered = engine.gathered_bytes - before
    return [bank.snapshot(k).tensor for k in range(len(bank))], screen.words, gathered


if __name__ == "__main__":
    main()
    flush_and_exit(0)
