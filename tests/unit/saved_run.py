"""A run with two tasks and random prompts on the tiny base, saved without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from trainer import config
from trainer.config import RunConfig
from trainer.prompts.peft_adapter import save_peft
from trainer.prompts.soft_prompt import VirtualTokens

TINY = config.resolve_path("examples/tiny_base")
LABELS = ["metabolic", "cardiac", "other"]
ROWS = [
    {"text": "The patient has hypothyroidism.", "label": "metabolic"},
    {"text": "Chest pain since noon. The dose of bisoprolol is unchanged.", "label": "cardiac"},
    {"text": "A cough.", "label": "other"},
    {"text": "Blood sugar is high after meals.", "label": "metabolic"},
    {"text": "The pulse is irregular.", "label": "cardiac"},
]


def save_run(folder: Path) -> Path:
    """Write the output folder of a finished run; its base is not quantized."""
    task: dict[str, Any] = {"input": "{text}\nAnswer:", "target": " {label}", "train": "t.jsonl"}
    settings = RunConfig.model_validate(
        {
            "output_dir": str(folder),
            "base": {"model": str(TINY), "quantization": "none"},
            "tasks": [
                {"name": "triage", "choices": LABELS, "metric": "accuracy", **task},
                {"name": "free", "metric": "exact_match", "max_new_tokens": 6, **task},
            ],
            "prompts": [
                {"name": "short", "task": "triage", "num_virtual_tokens": 3},
                {"name": "long", "task": "triage", "num_virtual_tokens": 7},
                {"name": "words", "task": "free", "num_virtual_tokens": 4},
                {"name": "unfinished", "task": "free", "num_virtual_tokens": 4},
            ],
            "training": {"steps": 4},
        }
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.yaml").write_text(config.dump(settings))
    generator = torch.Generator().manual_seed(0)
    for prompt in settings.prompts[:-1]:
        values_PH = torch.randn(prompt.num_virtual_tokens, 128, generator=generator) / 2
        save_peft(
            folder / "prompts" / prompt.name,
            VirtualTokens(values_PH),
            str(TINY),
            num_layers=4,
            num_attention_heads=4,
        )
    scores = {"task": "triage", "validation_accuracy": 0.75, "best_step": 4}
    summary = {"schema_version": 1, "status": "finished", "steps": 4, "prompts": {"short": scores}}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder
