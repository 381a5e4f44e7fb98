"""What storing the base in int8, and multiplying in it, does to the validation loss of prompts.

The same sample of rows is scored over the base as it was published and as int8 with each product,
one after the other on the same ranks, by what also validates a training run.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch

from trainer.config import Base, RunConfig, Task
from trainer.data.task_data import EvalSet, TaskData
from trainer.distributed.deepspeed_engine import Engine
from trainer.distributed.model_loading import load_base
from trainer.evaluation.evaluator import Evaluator
from trainer.evaluation.scoring import Request
from trainer.model.checkpoint_files import BaseFiles
from trainer.prompts.peft_adapter import load_peft
from trainer.prompts.saved_prompts import WEIGHTS
from trainer.prompts.soft_prompt import SoftPrompt, VirtualTokens
from trainer.runtime.console import Console
from trainer.runtime.errors import BadInput

ORIGINAL, EXACT = "none", "dequantize"


@dataclass(frozen=True)
class Setting:
    """A way to store and multiply the base's weights, in the words of the run file."""

    quantization: str
    matmul: str

    @property
    def name(self) -> str:
        return ORIGINAL if self.quantization == "none" else f"int8/{self.matmul}"

    def base(self, base: Base) -> Base:
        """The run's base with this setting."""
        changes = {"quantization": self.quantization, "matmul": self.matmul}
        if self.quantization == "none":
            changes |= {"embeddings": "keep", "head": "keep"}
        return base.model_copy(update=changes)


@dataclass(frozen=True)
class Reader:
    """What stands in front of the sampled rows of a task.

    Attributes:
        kind: ``no_prompt``, ``hand_written`` or ``trained``.
        name: the hand-written text, or the trained prompt's name.
        prompt: index among the trained prompts.
    """

    task: str
    kind: str
    name: str | None
    rows: EvalSet
    prompt: int | None = None


def settings() -> list[Setting]:
    """Not quantised; int8 exact to the stored weights; and every other product of int8."""
    products = get_args(Base.model_fields["matmul"].annotation)
    others = [value for value in products if value not in ("auto", EXACT)]
    return [Setting("none", EXACT), *(Setting("int8", matmul) for matmul in (EXACT, *others))]


def trained_prompts(folder: Path, config: RunConfig) -> dict[str, SoftPrompt]:
    """Virtual tokens, or keys and values, of every prompt that a run has saved, by name."""
    found = {}
    for prompt in config.prompts:
        adapter = folder / "prompts" / prompt.name
        if (adapter / WEIGHTS).is_file():
            found[prompt.name] = load_peft(adapter)
    return found


def readers(
    config: RunConfig, tasks: Mapping[str, TaskData], trained: Sequence[str], num_rows: int
) -> list[Reader]:
    """Who reads which rows: for each task with validation, no prompt and all of its prompts.

    Args:
        trained: names of the trained prompts, in the order of their indices.
        num_rows: of each task, drawn with ``training.seed``; all if it has fewer.
    """
    found = []
    for name, data in tasks.items():
        if "validation" not in data.evaluation:
            continue
        plain, task = data.evaluation["validation"], config.task(name)
        known = sorted({candidates[0].row for candidates in plain.candidates})
        draw = random.Random(f"{config.training.seed} {name}")
        chosen = set(draw.sample(known, min(num_rows, len(known))))
        found.append(Reader(name, "no_prompt", None, _sample(plain, chosen)))
        for text, rows in zip(task.hand_written, data.hand_written["validation"], strict=True):
            found.append(Reader(name, "hand_written", text, _sample(rows, chosen)))
        for k, prompt in enumerate(trained):
            if next(p.task for p in config.prompts if p.name == prompt) == name:
                found.append(Reader(name, "trained", prompt, _sample(plain, chosen), k))
    return [reader for reader in found if reader.rows.candidates]


def _sample(rows: EvalSet, chosen: set[int]) -> EvalSet:
    """The chosen rows of a set, scored by loss and, where there are choices, accuracy alone."""
    kept = [i for i, candidates in enumerate(rows.candidates) if candidates[0].row in chosen]
    return replace(rows.subset(kept), task=_scored_by_likelihood(rows.task))


def _scored_by_likelihood(task: Task) -> Task:
    """Nothing is generated, and nothing that was generated is run."""
    return task.model_copy(update={"metric": "accuracy" if task.scored_by_likelihood else "loss"})


def measure_losses(
    engine: Engine,
    files: BaseFiles,
    config: RunConfig,
    readers: Sequence[Reader],
    virtual_tokens: Sequence[SoftPrompt],
    console: Console,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Score all readers under each setting; a collective.

    Args:
        virtual_tokens: [P, H] of the trained prompts.

    Returns:
        The settings, each with why it was ``left_out`` (None: it was not), and the readers, each
        with ``scores`` by the setting's name.

    Raises:
        BadInput: if the base cannot be loaded in int8.
    """
    results = []
    scores: list[dict[str, dict[str, float | None]]] = [{} for _ in readers]
    for setting in settings():
        left_out = None
        try:
            found = _score(engine, files, config, setting, readers, virtual_tokens, console)
            for kept, score in zip(scores, found, strict=True):
                kept[setting.name] = {k: v if math.isfinite(v) else None for k, v in score.items()}
        except BadInput as error:
            if setting == Setting("int8", EXACT):
                raise
            left_out = error.problems[0]
        matmul = None if setting.name == ORIGINAL else setting.matmul
        results.append(
            {
                "name": setting.name,
                "quantization": setting.quantization,
                "matmul": matmul,
                "left_out": left_out,
            }
        )
    return results, [
        {
            "task": reader.task,
            "kind": reader.kind,
            "name": reader.name,
            "rows": len(reader.rows.candidates),
            "scores": score,
        }
        for reader, score in zip(readers, scores, strict=True)
    ]


def _score(
    engine: Engine,
    files: BaseFiles,
    config: RunConfig,
    setting: Setting,
    readers: Sequence[Reader],
    virtual_tokens: Sequence[SoftPrompt],
    console: Console,
) -> list[dict[str, float]]:
    """Load the base as a setting says, score, and free its memory."""
    console.print(f"scoring with quantization/matmul {setting.name}")
    base = setting.base(config.base)
    changed = config.model_copy(update={"base": base})
    # A failure of memory would end the ranks and lose what is measured already.
    loaded = load_base(engine, files, changed, console, must_fit=setting.name == ORIGINAL)
    hidden_size = loaded.model.hidden_size
    widths = [p.tensor.shape[1] for p in virtual_tokens if isinstance(p, VirtualTokens)]
    wrong = [width for width in widths if width != hidden_size]
    if wrong:
        raise BadInput(
            f"base.model: {base.model!r} has hidden size {hidden_size}, but the run's prompts were "
            f"trained with {wrong[0]}; give the base of the run"
        )
    prompts = [prompt.to(engine.device, torch.float32) for prompt in virtual_tokens]
    evaluator = Evaluator(engine, loaded.model, files.tokenizer, loaded.budget)
    requests = [Request(reader.rows, reader.prompt) for reader in readers]
    what = f"scoring with quantization/matmul {setting.name}"
    with console.phase(what, evaluator.num_texts(requests), "texts") as phase:
        scores = evaluator.score(requests, prompts, phase.advance)
    engine.release(loaded.model)
    return [scored.scores for scored in scores]
