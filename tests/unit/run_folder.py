"""A realistic output folder, made without training: for tests of tracking and report."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from trainer.config import RunConfig
from trainer.tracking import MetricsLog

STEPS = 120
TOKENS_PER_STEP = 2048
#: prompt -> task, virtual tokens, method, start and end of the validation loss, best accuracy
PROMPTS: dict[str, tuple[str, int, str, float, float, float]] = {
    "triage": ("triage", 20, "prompt_tuning", 1.62, 0.19, 0.94),
    "triage-mlp": ("triage", 10, "p_tuning", 1.71, 0.31, 0.91),
    "animals": ("animals", 20, "prompt_tuning", 2.05, 0.44, 0.96),
}
HAND_WRITTEN = {
    "triage": [
        ("Decide what the note is about: metabolic, cardiac or other.", 0.81, 0.69, 0.72),
        ("Topic?", 1.21, 0.48, 0.45),
        ("You are a careful nurse. Sort this note.", 1.02, 0.55, 0.52),
    ],
    "animals": [
        ("Answer the question about the animal.", 1.12, 0.61, 0.42),
        ("Animal quiz. Short answer:", 1.34, 0.52, 0.40),
        ("In the wild, what does this animal do?", 0.97, 0.74, 0.38),
    ],
}
NO_PROMPT = {"triage": (1.66, 0.34, 0.33), "animals": (2.11, 0.27, 0.25)}


def run_file(output_dir: Path, **tracking: Any) -> dict[str, Any]:
    """A resolved run file: every default written out."""
    tasks = []
    for name, hard in HAND_WRITTEN.items():
        tasks.append(
            {
                "name": name,
                "train": f"examples/data/{name}.train.jsonl",
                "validation": f"examples/data/{name}.valid.jsonl",
                "shifted_validation": f"examples/data/{name}.shifted.jsonl",
                "input": "{text}\nTopic:",
                "target": " {label}",
                "choices": ["metabolic", "cardiac", "other"],
                "metric": "accuracy",
                "too_long": "truncate",
                "hand_written": [text for text, *_ in hard],
            }
        )
    prompts = [
        {
            "name": name,
            "task": task,
            "method": method,
            "encoder": None,
            "num_virtual_tokens": tokens,
            "init": {"text": HAND_WRITTEN[task][0][0], "vocab": False, "random": False},
            "learning_rate": 0.003,
            "weight_decay": 0.0,
            "warmup_ratio": 0.03,
            "max_grad_norm": 1.0,
            "seed": None,
        }
        for name, (task, tokens, method, *_) in PROMPTS.items()
    ]
    return {
        "output_dir": str(output_dir),
        "base": {"model": "examples/tiny_base", "revision": None, "quantization": "int8"},
        "engine": {"deepspeed": "ds_configs/zero3.json", "gradient_checkpointing": "auto"},
        "tasks": tasks,
        "prompts": prompts,
        "training": {"steps": STEPS, "tokens_per_step": TOKENS_PER_STEP, "seed": 0},
        "evaluation": {"every": 20, "early_stopping": {"patience": 3}},
        "checkpoint": {"every": 20, "keep": 3},
        "tracking": {"experiment": "support", "uri": None, "system_metrics": False, **tracking},
    }


def small_config(metric: str, prompts: list[dict[str, Any]]) -> RunConfig:
    """A run with one task ``t`` and prompts with these settings."""
    task = {"name": "t", "metric": metric, "train": "t.jsonl", "input": "{text}"}
    return RunConfig.model_validate(
        {
            "output_dir": "run",
            "base": {"model": "tiny"},
            "tasks": [task | {"target": "{label}", "choices": ["yes", "no"]}],
            "prompts": [{"task": "t", **prompt} for prompt in prompts],
            "training": {"steps": 1},
        }
    )


def write_inputs(output_dir: Path, **tracking: Any) -> Path:
    """What the trainer writes before the first step."""
    output_dir.mkdir(parents=True, exist_ok=True)
    run = run_file(output_dir, **tracking)
    (output_dir / "run.yaml").write_text(yaml.safe_dump(run, sort_keys=False))
    environment = {
        "versions": {
            "python": "3.11.7",
            "torch": "2.13.0",
            "deepspeed": "0.19.8",
            "peft": "0.21.2",
        },
        "world_size": 2,
        "device": "cpu (AVX-512 VNNI)",
        "git_revision": "9d8f0c1e5b7a4b3c2d1e0f9a8b7c6d5e4f3a2b1c",
        "command": "promptshard train examples/support.yaml training.steps=120",
    }
    _write_json(output_dir / "environment.json", environment)
    splits = {"train": 600, "validation": 150, "shifted_validation": 150}
    datasets = [
        {
            "task": task,
            "split": split,
            "path": f"examples/data/{task}.{split}.jsonl",
            "rows": rows,
            "digest": f"{random.Random(task + split).getrandbits(256):064x}",
        }
        for task in HAND_WRITTEN
        for split, rows in splits.items()
    ]
    _write_json(output_dir / "datasets.json", datasets)
    return output_dir


def log_steps(log: MetricsLog, first: int, last: int) -> None:
    """Lines of steps ``first`` to ``last``, the same at every call but for the time."""
    for step in range(first, last + 1):
        tokens = step * TOKENS_PER_STEP
        for name, (_, _, _, start, end, accuracy) in PROMPTS.items():
            noise = random.Random(f"{name}{step}")
            done = 1 - math.exp(-4 * step / STEPS)
            loss = start + (end - start) * done
            train = {
                "train_loss": loss * 0.93 + noise.gauss(0, 0.05),
                "learning_rate": 0.0015 * (1 + math.cos(math.pi * step / STEPS)),
                "grad_norm": 0.4 + abs(noise.gauss(0, 0.2)),
            }
            if step:
                log.log(step, tokens, train, prompt=name)
            if step % 20 == 0:
                shift = 0.08 if "triage" in name else 0.31
                valid = 0.3 + (accuracy - 0.3) * done
                scores = {
                    "validation_loss": loss,
                    "validation_accuracy": valid,
                    "shifted_validation_loss": loss + 2 * shift,
                    "shifted_validation_accuracy": valid - shift * done,
                    "generalization_gap": loss * 0.07,
                }
                log.log(step, tokens, scores, prompt=name)
        if step:
            noise = random.Random(step)
            speed = 5200 + noise.gauss(0, 150)
            run = {
                "useful_tokens_per_second": speed,
                "step_seconds": 3 * TOKENS_PER_STEP / speed,
                "peak_rss_bytes": 612_000_000 + 1000 * step,
                "gathered_bytes": 12_400_000,
            }
            log.log(step, 3 * tokens, run)


def write_results(output_dir: Path, status: str = "finished") -> None:
    """What the trainer writes after the last step."""
    prompts = {}
    for name, (task, tokens, _, start, end, accuracy) in PROMPTS.items():
        loss = start + (end - start) * (1 - math.exp(-4))
        shift = 0.08 if task == "triage" else 0.31
        prompts[name] = {
            "task": task,
            "validation_loss": loss,
            "validation_accuracy": accuracy,
            "shifted_validation_loss": loss + 2 * shift,
            "shifted_validation_accuracy": accuracy - shift,
            "best_step": STEPS,
            "num_virtual_tokens": tokens,
            "label_tokens": 4800,
            "skipped_updates": 0,
            "stopped": {"step": STEPS, "reason": "finished"},
        }
        folder = output_dir / "prompts" / name
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(folder / "adapter_config.json", {"peft_type": "PROMPT_TUNING"})
        (folder / "adapter_model.safetensors").write_bytes(name.encode() * 50)
    keys = ("validation_loss", "validation_accuracy", "shifted_validation_accuracy")
    tasks = {
        task: {
            "no_prompt": dict(zip(keys, NO_PROMPT[task], strict=True)),
            "hand_written": [{"text": t, **dict(zip(keys, v, strict=True))} for t, *v in hard],
        }
        for task, hard in HAND_WRITTEN.items()
    }
    data = {
        task: {
            "train": {"rows": 600, "skipped": 0, "truncated": 3 if task == "triage" else 0},
            "validation": {"rows": 150, "skipped": 0, "truncated": 0},
            "shifted_validation": {"rows": 150, "skipped": 0, "truncated": 0},
        }
        for task in HAND_WRITTEN
    }
    summary = {
        "status": status,
        "steps": STEPS,
        "prompts": prompts,
        "selected": {"triage": {"prompt": "triage", "why": "best of 2 prompts", "shorter": None}},
        "tasks": tasks,
        "throughput": {"useful_tokens_per_second": 5204.3},
        "memory": {
            "base_bytes_per_rank": 3_412_992,
            "peak_rss_bytes": 612_120_000,
            "peak_gpu_bytes": None,
        },
        "communication": {"gathered_bytes_per_step": 12_400_000},
        "load": {"seconds": 1.8, "bytes_read_per_rank": 7_340_032},
        "versions": {"torch": "2.13.0", "deepspeed": "0.19.8"},
        "world_size": 2,
        "data": data,
    }
    _write_json(output_dir / "summary.json", summary)


def checkpoint_state(step: int, identity: dict[str, Any], *prompts: str) -> dict[str, Any]:
    """JSON of a checkpoint, of the shape that a run writes."""
    return {
        "identity": identity,
        "bank": {
            "prompts": {
                p: {"active": True, "optimizer": {"updates": 1, "scale": 1.0}} for p in prompts
            }
        },
        "loop": {
            "progress": {"step": step},
            "stopping": {p: {"best_step": None, "waited": 0} for p in prompts},
            "feed": [{"epoch": 0, "position": 3, "ahead": [5]} for _ in prompts],
        },
        "chosen": {
            "where": {"device": "cpu"},
            "matmul": "int8",
            "shard_group": 2,
            "kept_bytes": 5,
            "stream_tokens": 777,
            "ramp": [0.5, 1],
            "gradient_checkpointing": True,
        },
    }


def save_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Any], state: Mapping[str, Any], keep: int
) -> Path:
    """Write one checkpoint of these tensors and this state."""
    from trainer.checkpointing import checkpoint

    return checkpoint.write(folder, checkpoint.take_snapshot(step, tensors, state), keep)


def finished_run(output_dir: Path, **tracking: Any) -> Path:
    """A whole run's folder, but for ``report.html``."""
    write_inputs(output_dir, **tracking)
    log = MetricsLog(output_dir)
    log_steps(log, 0, STEPS)
    log.close()
    write_results(output_dir)
    return output_dir


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2))
