"""Planned and measured seconds of a training step on one CPU rank, over bases of several shapes.

    python -m benchmarks.step_time [--only NAME ...]

The machine is measured before each base (``trainer.model.cpu_rates``). Times are CPU seconds of one
thread, so that other programs disturb them little; the fastest of a few steps counts. Writes
benchmarks/results/step-time.md.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

from transformers import AutoConfig

from benchmarks.figures import machine
from benchmarks.random_base import make_tokenizer, save_random
from trainer.config import load
from trainer.cost_model.base_headers import base_shape_of
from trainer.cost_model.base_shape import Header
from trainer.cost_model.hardware import cpu_device
from trainer.cost_model.run_needs import needs_of_tasks
from trainer.cost_model.run_plan import placed_option
from trainer.data.task_data import load_tasks
from trainer.distributed.deepspeed_engine import Engine
from trainer.distributed.model_loading import load_base
from trainer.distributed.prefetch import RankInfo, prepare_step
from trainer.model.checkpoint_files import open_base
from trainer.model.cpu_rates import measure_cpu
from trainer.packing.batch_source import BatchSource
from trainer.prompts.soft_prompt import prompt_lengths
from trainer.runtime.console import Console
from trainer.runtime.process import flush_and_exit
from trainer.training.initial_bank import make_bank
from trainer.training.step import batch_gradients

RESULTS = Path(__file__).resolve().parent / "results" / "step-time.md"
#: Steps of a base; the first compiles and records the order of layers, the others count.
STEPS = 4
_SIZES: dict[str, Any] = {
    "vocab_size": 8000,
    "num_hidden_layers": 4,
    "max_position_embeddings": 1024,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def _llama(hidden: int, inner: int, heads: int, key_heads: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        **more,
    }


#: Name of a base -> model type, its sizes, and settings of the run.
SHAPES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "llama 256, 8 layers": ("llama", _llama(256, 704, 4, 4, num_hidden_layers=8), []),
    "llama 384, dequantized": ("llama", _llama(384, 1024, 6, 2, num_hidden_layers=6), []),
    "llama 576 (SmolLM2)": ("llama", _llama(576, 1536, 9, 3, vocab_size=49152), []),
    "llama 768 (peers)": ("llama", _llama(768, 2048, 12, 12, vocab_size=32000), []),
    "llama 768, recomputed": (
        "llama",
        _llama(768, 2048, 12, 12),
        ["engine.gradient_checkpointing=true"],
    ),
    "llama 768, fp32": ("llama", _llama(768, 2048, 12, 12), ["base.quantization=none"]),
    "llama 768, short batches": (
        "llama",
        _llama(768, 2048, 12, 12),
        ["training.micro_batch_tokens=128"],
    ),
    "qwen2 896": ("qwen2", _llama(896, 4864, 14, 2, num_hidden_layers=3), []),
    "qwen3 1024": ("qwen3", _llama(1024, 3072, 16, 8, head_dim=128, num_hidden_layers=3), []),
    "llama 2048": ("llama", _llama(2048, 5632, 32, 4, num_hidden_layers=2), []),
}


def write_run(root: Path, shape: tuple[str, dict[str, Any], list[str]]) -> Path:
    """Write rows, a base of random weights and a run file."""
    draw = random.Random(0)
    with (root / "rows.jsonl").open("w") as file:
        for _ in range(200):
            length = min(400, max(12, int(draw.lognormvariate(4.1, 0.6))))
            words = [f"w{draw.randrange(3, 300)}" for _ in range(length)]
            row = {"text": " ".join(words), "answer": " ".join(words[:4])}
            file.write(json.dumps(row) + "\n")
    save_random(root / "base", AutoConfig.for_model(shape[0], **(_SIZES | shape[1])))
    task = {"name": "t", "train": str(root / "rows.jsonl"), "validation_share": 0.1}
    run = {
        "output_dir": str(root / "out"),
        "base": {"model": str(root / "base")},
        "tasks": [task | {"input": "{text}", "target": "{answer}"}],
        "prompts": [{"name": "p", "task": "t", "init": "random"}],
        "training": {"steps": 10, "tokens_per_step": 1000},
    }
    path = root / "run.yaml"
    path.write_text(json.dumps(run))
    return path


def measure(engine: Engine, shape: tuple[str, dict[str, Any], list[str]]) -> dict[str, float]:
    """Return planned and measured CPU seconds of a step."""
    with tempfile.TemporaryDirectory() as folder:
        return _measure(engine, write_run(Path(folder), shape), shape[2])


def _measure(engine: Engine, run_file: Path, overrides: list[str]) -> dict[str, float]:
    config = load(run_file, overrides)
    console = Console(io.StringIO(), io.StringIO(), shown=False)
    files = open_base(config.base)
    tasks = load_tasks(config, make_tokenizer(), files.context_length, files.config.vocab_size)
    lengths = [n for data in tasks.values() for n in data.train.lengths.tolist()]
    loaded = load_base(engine, files, config, console, lengths=lengths)
    bank = make_bank(config, engine, loaded.model, files, None, console.warn)
    source, rank = BatchSource(config, tasks), RankInfo(0, 1, engine.device)
    rows = source.next_step(bank.active)
    headers = {name: Header(t.type, t.shape) for name, t in files.tensors.items()}
    base = base_shape_of(headers, files.config, config.base, loaded.dtype.itemsize)
    needs = replace(
        needs_of_tasks(config, tasks, base, files.config, files.num_bytes), steps_rows=[rows]
    )
    seconds = []
    for _ in range(STEPS):
        prompts = bank.virtual_tokens()
        batch = prepare_step(rows, prompt_lengths(prompts), rank, loaded.budget.tokens)
        started = time.process_time()
        batch_gradients(engine, loaded.model, batch, prompts)
        seconds.append(time.process_time() - started)
    rates = measure_cpu(time.process_time)
    device = cpu_device(1, rates)
    option = placed_option(needs, device, [1], loaded.placement, loaded.memory, loaded.budget)
    engine.release(loaded.model)
    return {
        "planned": option.step_seconds,
        "measured": min(seconds[1:]),
        "int8": (rates.int8_flops or 0.0) / 1e9,
        "float": rates.float_flops / 1e9,
        "loops": rates.loop_rate / 1e9,
    }


def table(results: dict[str, dict[str, float]]) -> str:
    lines = [
        "# Planned and measured time of a step",
        "",
        f"`python -m benchmarks.step_time` on {machine()}: one rank with one thread, CPU seconds "
        "of a step of about 1,000 tokens. GFLOP/s of int8 and fp32 products and GB/s of loops, "
        "measured before each base, are what the plan starts from.",
        "",
        "| base | planned, s | measured, s | planned / measured | int8, fp32, loops |",
        "|---|---|---|---|---|",
    ]
    for name, row in results.items():
        lines.append(
            f"| {name} | {row['planned']:.2f} | {row['measured']:.2f} | "
            f"{row['planned'] / row['measured']:.2f} | {row['int8']:.0f}, {row['float']:.0f}, "
            f"{row['loops']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", help="bases, by how their names begin")
    only = parser.parse_args().only
    engine = Engine(600)
    results = {}
    for name, shape in SHAPES.items():
        if only is None or any(name.startswith(part) for part in only):
            results[name] = measure(engine, shape)
            print(name, json.dumps(results[name]), flush=True)
    text = table(results)
    print(text)
    if only is None:
        RESULTS.write_text(text)
    engine.close()


if __name__ == "__main__":
    main()
    flush_and_exit(0)
