"""Measure validation losses of prompts with the original base model and with int8.

The evaluator of training scores the same sample of rows with the base model as published and with
every int8 matrix product, one after the other on the same ranks.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import torch

from trainer.config import Base, RunConfig
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
    """How to store and multiply the base model's weights: settings of the run file."""

    quantization: str
    matmul: str

    @property
    def name(self) -> str:
        return ORIGINAL if self.quantization == "none" else f"int8/{self.matmul}"

    def base(self, base: Base) -> Base:
        """Return the run's base model with this setting."""
        changes = {"quantization": self.quantization, "matmul": self.matmul}
        if self.quantization == "none":
            changes |= {"embeddings": "keep", "head": "keep"}
        return base.model_copy(update=changes)


@dataclass(frozen=True)
class Arm:
    """A prompt and the sampled rows to score with it.

    Attributes:
        kind: ``no_prompt``, ``hand_written`` or ``trained``.
        name: text of the hand-written prompt, or name of the trained one.
    """

    task: str
    kind: str
    name: str | None
    rows: EvalSet
    prompt: int | None = None


def settings() -> list[Setting]:
    """Return the settings to compare: not quantized, int8 with exact products, all other int8."""
    products = get_args(Base.model_fields["matmul"].annotation)
    # Without gradients, int8x2 is int8.
    others = [value for value in products if value not in ("auto", "int8x2", EXACT)]
    return [Setting("none", EXACT), *(Setting("int8", matmul) for matmul in (EXACT, *others))]


def trained_prompts(folder: Path, config: RunConfig) -> dict[str, SoftPrompt]:
    """Load virtual tokens, or keys and values, of every saved prompt of a run, by name."""
    adapters = {prompt.name: folder / "prompts" / prompt.name for prompt in config.prompts}
    return {
        name: load_peft(adapter)
        for name, adapter in adapters.items()
        if (adapter / WEIGHTS).is_file()
    }


def all_arms(
    config: RunConfig, tasks: Mapping[str, TaskData], trained: Sequence[str], num_rows: int
) -> list[Arm]:
    """Return for each task with validation rows: no prompt, hand-written and trained prompts.

    Args:
        trained: names of the trained prompts, in the order of their indices.
        num_rows: rows of each task, drawn with ``training.seed``; all if it has fewer.
    """
    prompts = {prompt.name: prompt for prompt in config.prompts}
    arms = []
    for name, data in tasks.items():
        if "validation" not in data.evaluation:
            continue
        plain, task = data.evaluation["validation"], config.task(name)
        numbers = sorted({candidates[0].row for candidates in plain.candidates})
        draw = random.Random(f"{config.training.seed} {name}")
        sample = set(draw.sample(numbers, min(num_rows, len(numbers))))
        arms.append(Arm(name, "no_prompt", None, _sample(plain, sample)))
        for text, rows in zip(task.hand_written, data.hand_written["validation"], strict=True):
            arms.append(Arm(name, "hand_written", text, _sample(rows, sample)))
        for k, prompt in enumerate(trained):
            if prompts[prompt].task == name:
                rows = data.evaluation_at(prompts[prompt].placement)["validation"]
                arms.append(Arm(name, "trained", prompt, _sample(rows, sample), k))
    return [arm for arm in arms if arm.rows.candidates]


def _sample(rows: EvalSet, sample: set[int]) -> EvalSet:
    """Select the rows of a sample, scored by loss and, for a task with choices, by accuracy.

    Nothing is generated, so no generated code runs.
    """
    kept = [i for i, candidates in enumerate(rows.candidates) if candidates[0].row in sample]
    metric = "accuracy" if rows.task.scored_by_likelihood else "loss"
    return replace(rows.subset(kept), task=rows.task.model_copy(update={"metric": metric}))


def measure_losses(
    engine: Engine,
    files: BaseFiles,
    config: RunConfig,
    arms: Sequence[Arm],
    virtual_tokens: Sequence[SoftPrompt],
    console: Console,
) -> dict[str, Any]:
    """Score all arms under each setting; a collective.

    Returns:
        ``seed`` of the sample; ``settings``, each with the reason why it was ``left_out`` or None;
        ``reference``, the first setting that was not left out; and ``readers``, the arms, each with
        ``scores`` by the name of the setting.

    Raises:
        BadInput: the base model cannot be loaded in int8.
    """
    results = []
    scores: list[dict[str, dict[str, float | None]]] = [{} for _ in arms]
    for setting in settings():
        left_out = None
        try:
            scored = _score(engine, files, config, setting, arms, virtual_tokens, console)
            for of_arm, score in zip(scores, scored, strict=True):
                of_arm[setting.name] = {
                    k: v if math.isfinite(v) else None for k, v in score.items()
                }
        except BadInput as error:
            if setting == Setting("int8", EXACT):
                raise
            left_out = error.problems[0]
        results.append(
            {
                "name": setting.name,
                "quantization": setting.quantization,
                "matmul": None if setting.name == ORIGINAL else setting.matmul,
                "left_out": left_out,
            }
        )
    return {
        "seed": config.training.seed,
        "reference": next(result["name"] for result in results if not result["left_out"]),
        "settings": results,
        "readers": [
            {
                "task": arm.task,
                "kind": arm.kind,
                "name": arm.name,
                "rows": len(arm.rows.candidates),
                "scores": of_arm,
            }
            for arm, of_arm in zip(arms, scores, strict=True)
        ],
    }


def _score(
    engine: Engine,
    files: BaseFiles,
    config: RunConfig,
    setting: Setting,
    arms: Sequence[Arm],
    virtual_tokens: Sequence[SoftPrompt],
    console: Console,
) -> list[dict[str, float]]:
    title = f"scoring with quantization/matmul {setting.name}"
    console.print(title)
    changed = config.model_copy(update={"base": setting.base(config.base)})
    # Running out of memory would end the ranks, so an original that does not fit is refused.
    loaded = load_base(engine, files, changed, console, must_fit=setting.name == ORIGINAL)
    hidden_size = loaded.model.hidden_size
    for prompt in virtual_tokens:
        if isinstance(prompt, VirtualTokens) and prompt.tensor.shape[1] != hidden_size:
            raise BadInput(
                f"base.model: {config.base.model!r} has hidden size {hidden_size}, but the run's "
                f"prompts were trained with {prompt.tensor.shape[1]}; use the base model of the run"
            )
    prompts = [prompt.to(engine.device, torch.float32) for prompt in virtual_tokens]
    evaluator = Evaluator(engine, loaded.model, files.tokenizer, loaded.budget)
    requests = [Request(arm.rows, arm.prompt) for arm in arms]
    with console.phase(title, evaluator.num_texts(requests), "texts") as phase:
        scores = evaluator.score(requests, prompts, phase.advance)
    engine.release(loaded.model)
    return [scored.scores for scored in scores]
