"""Train a prompt on a base of 8 billion random weights, on two CPU ranks of one machine.

    python -m benchmarks.big           # sizes of Llama-3.1-8B; 8 GB of disk, 13 GB of memory
    python -m benchmarks.big --small   # a billion weights, to try this file (big-1b.md)

Writes the base in int8, part by part. Trains, trains again until a rank is killed, and resumes.
Compares the plan with what was measured, and writes benchmarks/results/big.{md,json}.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import psutil
import torch

from benchmarks.figures import machine
from benchmarks.memory import llama
from benchmarks.random_base import make_tokenizer
from trainer.commands.prepare import Entry, write_weights
from trainer.model.transformers_model import build_transformers_model

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
RANKS, STEPS, KILLED_AFTER = 2, 3, 1
#: Elements that are drawn at a time.
BLOCK = 16 << 20
#: Maximum weight.
SCALE = 0.05
FILE_BYTES = 2 * 10**9
SIZES = {"8B": (32, 4096, 14_336, 32), "1B": (12, 2048, 8192, 16)}
#: Bytes read at a time to measure the disk.
READ_BYTES = 16 << 20


def write_base(folder: Path, size: str) -> int:
    """Write a Llama with random weights in int8; return the bytes of its weight files."""
    folder.mkdir(parents=True)
    config = llama(*SIZES[size])
    config.dtype = torch.bfloat16
    weights = build_transformers_model(config, size, dtype=torch.bfloat16).state_dict()
    draw = np.random.default_rng(0)
    entries = [e for name, weight in weights.items() for e in _entries(name, weight.shape, draw)]
    num_bytes = write_weights(folder, entries, FILE_BYTES)
    text = config.to_dict() | {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "quantization_config": {
            "quant_method": "bitsandbytes",
            "load_in_8bit": True,
            "load_in_4bit": False,
            "llm_int8_threshold": 0.0,
            "llm_int8_skip_modules": None,
        },
    }
    (folder / "config.json").write_text(json.dumps(text, default=str))
    make_tokenizer().save_pretrained(folder)
    return num_bytes


def _entries(name: str, shape: torch.Size, draw: np.random.Generator) -> Iterator[Entry]:
    count = shape.numel()

    def blocks() -> Iterator[int]:
        yield from (min(BLOCK, count - start) for start in range(0, count, BLOCK))

    def write_int8(file: BinaryIO) -> None:
        for size in blocks():
            file.write(draw.integers(-127, 128, size, dtype=np.int8).data)

    def write_ones(file: BinaryIO) -> None:
        file.write(torch.ones(count, dtype=torch.bfloat16).view(torch.uint8).numpy().data)

    if len(shape) < 2:
        yield Entry(name, "BF16", tuple(shape), 2 * count, write_ones)
        return
    scales = np.full(shape[0], SCALE, np.float32)
    yield Entry(name, "I8", tuple(shape), count, write_int8)
    scb = name.removesuffix("weight") + "SCB"
    yield Entry(scb, "F32", (shape[0],), scales.nbytes, lambda file: _write(file, scales))
    layout = np.zeros(1, np.uint8)
    yield Entry(f"{name}_format", "U8", (), 1, lambda file: _write(file, layout))


def _write(file: BinaryIO, values: np.ndarray[Any, Any]) -> None:
    file.write(values.data)


def write_run(root: Path, base: Path) -> Path:
    """Write rows and a run file with a few short steps and little evaluation."""
    draw = random.Random(0)
    rows = [{"text": " ".join(f"w{draw.randrange(3, 300)}" for _ in range(12))} for _ in range(40)]
    for row in rows:
        row["answer"] = row["text"].split()[0]
    for name, part in (("train", rows[:38]), ("validation", rows[38:])):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    run = {
        "base": {"model": str(base), "embeddings": "int8", "head": "int8"},
        "output_dir": str(root / "out"),
        "tasks": [
            {
                "name": "t",
                "train": str(root / "train.jsonl"),
                "validation": str(root / "validation.jsonl"),
                "input": "{text}",
                "target": " {answer}",
                "metric": "loss",
            }
        ],
        "prompts": [{"name": "p", "task": "t", "init": "random", "num_virtual_tokens": 8}],
        "engine": {"shard_group": "world", "timeout_seconds": 1800},
        "training": {"steps": STEPS, "tokens_per_step": 60},
        "evaluation": {"train_rows": 0},
        "checkpoint": {"every": 1},
    }
    path = root / "run.yaml"
    path.write_text(json.dumps(run, indent=1))
    return path


def train(run: Path, out: Path, kill_after: int | None = None) -> float:
    """Train on two ranks; return the seconds. Kill them after the checkpoint of a step."""
    words = ["train", str(run), f"output_dir={out}", "--processes", str(RANKS)]
    started = time.monotonic()
    log = out.with_suffix(".log").open("w")
    process = subprocess.Popen(
        [sys.executable, "-m", "launch", *words],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    if kill_after is not None:
        checkpoint = out / "checkpoints" / f"step-{kill_after:08}"
        while not checkpoint.is_dir() and process.poll() is None:
            time.sleep(0.2)
        killed = psutil.Process(process.pid).children(recursive=True)  # in sessions of their own
        for each in [*killed, process]:
            each.send_signal(signal.SIGKILL)
        psutil.wait_procs(killed)
    code = process.wait()
    if kill_after is None and code:
        raise SystemExit(Path(log.name).read_text()[-4000:])
    return time.monotonic() - started


def step_seconds(out: Path) -> float:
    """Mean seconds of the steps after the first, which compiles."""
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    seconds = [x["metrics"]["step_seconds"] for x in lines if "step_seconds" in x["metrics"]]
    return sum(seconds[1:]) / len(seconds[1:])


def read_seconds(base: Path) -> float:
    """Seconds in which two processes read all weight files together, each half of every file."""
    started = time.monotonic()
    fork = multiprocessing.get_context("fork")  # starts no interpreter: only reading is timed
    readers = [fork.Process(target=read_half, args=(base, rank)) for rank in range(RANKS)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
        if reader.exitcode:
            raise SystemExit("error: a process could not read the base")
    return time.monotonic() - started


def read_half(base: Path, rank: int) -> None:
    for path in sorted(base.glob("*.safetensors")):
        half = path.stat().st_size // RANKS
        with path.open("rb", buffering=0) as file:
            file.seek(rank * half)
            left = half
            while left > 0 and (read := len(file.read(min(READ_BYTES, left)))):
                left -= read


def drop_cached(base: Path) -> None:
    """Have the kernel forget the files, so that they are read from the disk."""
    for path in base.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(root: Path, size: str) -> dict[str, Any]:
    started = time.monotonic()
    num_bytes = write_base(root / "base", size)
    written = time.monotonic() - started
    run = write_run(root, root / "base")
    drop_cached(root / "base")
    reading = read_seconds(root / "base")
    drop_cached(root / "base")
    load = os.getloadavg()
    seconds = train(run, root / "whole")
    summary = json.loads((root / "whole" / "summary.json").read_text())
    result = {
        "base": size,
        "machine": machine(),
        "ranks": RANKS,
        "file_bytes": num_bytes,
        "write_seconds": written,
        "read_seconds": reading,
        "load_average": load,
        "seconds": seconds,
        "step_seconds": step_seconds(root / "whole"),
        "summary": {key: summary[key] for key in _KEYS},
        "equal": None,
    }
    print(table(result), flush=True)
    train(run, root / "killed", kill_after=KILLED_AFTER)
    train(run, root / "killed")
    return result | {"equal": _prompts(root / "whole") == _prompts(root / "killed")}


_KEYS = ("memory", "communication", "load", "planned", "time", "throughput", "world_size")


def _prompts(out: Path) -> dict[str, bytes]:
    files = (out / "prompts").glob("**/adapter_model.safetensors")
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def table(result: dict[str, Any]) -> str:
    memory, plan = result["summary"]["memory"], result["summary"]["planned"]
    traffic, load = result["summary"]["communication"], result["summary"]["load"]
    cpu = result["summary"]["throughput"]["cpu_seconds_per_step"]
    command = f"python -m benchmarks.big{'' if result['base'] == '8B' else ' --small'}"
    rows = [
        (
            "resident bytes of the base per rank, GB",
            plan["base_bytes_per_rank"],
            memory["base_bytes_per_rank"],
        ),
        ("peak memory per rank, GB", plan["peak_bytes"], memory["peak_rss_bytes"]),
        (
            "received for the base per step and rank, GB",
            plan["gathered_bytes_per_step"],
            traffic["gathered_bytes_per_step"],
        ),
    ]
    lines = [
        f"# A base of {result['base'][:-1]} billion weights on {result['ranks']} CPU ranks",
        "",
        f"`{command}` on {result['machine']}; load average at the start "
        f"{result['load_average'][0]:.1f}. Sizes of Llama-3.1-8B"
        f"{' with fewer and smaller layers' if result['base'] != '8B' else ''}, random weights in "
        f"int8, {result['file_bytes'] / 1e9:.2f} GB of files. {STEPS} steps of at most 60 tokens.",
        "",
        "| | planned | measured |",
        "|---|---|---|",
        *(f"| {name} | {a / 1e9:.3f} | {b / 1e9:.3f} |" for name, a, b in rows),
        f"| seconds per step | {plan['step_seconds']:.1f} | {result['step_seconds']:.1f} |",
        f"| CPU seconds per step and rank | {plan['step_seconds']:.1f} | {cpu:.1f} |",
        f"| loading, seconds | {plan['load_seconds']:.1f} | {load['seconds']:.1f} |",
        "",
        f"Two processes read the same bytes from the disk in {result['read_seconds']:.1f} s. The "
        "files are hashed before they are loaded, so that loading finds them in memory. Steps are "
        "those after the first, which compiles. Other programs disturb seconds more than CPU "
        "seconds. "
        f"{_resumed(result['equal'])}",
        "",
    ]
    return "\n".join(lines)


def _resumed(equal: bool | None) -> str:
    if equal is None:
        return "Kill and resume were not measured."
    words = "bit-equal to" if equal else "NOT equal to"
    return (
        f"Killed after step {KILLED_AFTER} and resumed: the prompt is {words} the undisturbed one."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--small", action="store_true", help="a billion weights")
    parser.add_argument("--folder", type=Path, help="where the base is written, then deleted")
    args = parser.parse_args()
    Path("/proc/self/oom_score_adj").write_text("1000")  # the first process to end if memory lacks
    root = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        result = measure(root, "1B" if args.small else "8B")
    finally:
        shutil.rmtree(root)
    text = table(result)
    print(text)
    name = "big-1b" if args.small else "big"
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text(text)


if __name__ == "__main__":
    main()
