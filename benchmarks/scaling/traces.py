"""Steps of 2 and 4 CPU ranks on two hosts with a slow link, measured and simulated.

The hosts are network namespaces of this machine, joined by a virtual cable; the token bucket filter
of ``tc`` limits what each host sends. Needs root, ``ip`` and ``tc``.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.scaling.gather_simulation import Layer, step_seconds

ROOT = Path(__file__).resolve().parents[2]
ADDRESSES = ("10.213.78.1", "10.213.78.2")
#: Ranks, and rates of the link in Mbit/s; None: as fast as the kernel copies.
RANKS = (2, 4)
RATES = (None, 200, 50)
#: Timed steps of a run, after two that DeepSpeed records.
STEPS = 3
SHAPE: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
}
ROW_TOKENS, ROWS_PER_RANK = 32, 4
#: Bytes of the all-gather by which the rate of the link is measured.
PROBE_BYTES = 12_000_000


@contextmanager
def hosts() -> Iterator[list[str]]:
    """Make two namespaces with a cable between them; yield their names."""
    names = [f"promptshard-link-{os.getpid()}-{i}" for i in (0, 1)]
    links = [f"sl{os.getpid() % 100000:05d}{i}" for i in (0, 1)]
    try:
        for name in names:
            _run("ip", "netns", "add", name)
        _run("ip", "link", "add", links[0], "type", "veth", "peer", "name", links[1])
        for name, link, address in zip(names, links, ADDRESSES, strict=True):
            _run("ip", "link", "set", link, "netns", name)
            _run("ip", "-n", name, "link", "set", link, "name", "cable")
            _run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "cable")
            _run("ip", "-n", name, "link", "set", "lo", "up")
            _run("ip", "-n", name, "link", "set", "cable", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def limit(name: str, megabits: int | None) -> None:
    """Limit what a host sends."""
    _run("tc", "-n", name, "qdisc", "del", "dev", "cable", "root", check=False)
    if megabits is not None:
        words = ("tbf", "rate", f"{megabits}mbit", "burst", "256kb", "limit", "8mb")
        _run("tc", "-n", name, "qdisc", "add", "dev", "cable", "root", *words)


def _run(*words: str, check: bool = True) -> None:
    program = shutil.which(words[0], path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    done = subprocess.run([program or words[0], *words[1:]], capture_output=True, text=True)
    if check and done.returncode:
        raise OSError(f"{' '.join(words)}: {done.stderr.strip()}")


def measure() -> list[dict[str, Any]]:
    """Measure all ranks and rates, and simulate them."""
    from benchmarks.random_base import llama_config, save_random

    results = []
    with tempfile.TemporaryDirectory() as temporary, hosts() as names:
        base = save_random(Path(temporary) / "base", llama_config(**SHAPE))
        for ranks in RANKS:
            free: dict[str, Any] | None = None
            for megabits in RATES:
                for name in names:
                    limit(name, megabits)
                result = _start(names, base, ranks, Path(temporary) / "out.json")
                free = free or result
                predicted = simulated(result, free["seconds"])
                load = os.getloadavg()[0]
                results.append(
                    {"ranks": ranks, "megabits": megabits, "load": load}
                    | result
                    | {"simulated": predicted}
                )
                print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    return results


def simulated(result: dict[str, Any], computing: float) -> float:
    """Seconds of a step by simulation.

    Args:
        computing: seconds of a step with a fast link: products, and copies between the processes of
            one machine.
    """
    sizes = result["layers"]
    seconds = computing / (2 * len(sizes))
    # Exchanged rows: half before the first layer, half after the last.
    other = result["exchanged"] / 2
    layers = [Layer(other, 0.0), *(Layer(size, seconds) for size in sizes)]
    live = result["live_layers"]
    layers += [Layer(0.0, seconds)] * live
    layers += [Layer(size, seconds) for size in reversed(sizes[: len(sizes) - live])]
    layers.append(Layer(other, 0.0))
    return step_seconds(layers, {"cable": result["rate"]})


def _start(names: list[str], base: Path, ranks: int, out: Path) -> dict[str, Any]:
    common = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
    common |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "cable"}
    common |= {"MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": "29511", "WORLD_SIZE": str(ranks)}
    local = ranks // 2
    processes = []
    for rank in range(ranks):
        command = [sys.executable, "-m", "benchmarks.scaling.traces", str(base), str(out)]
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank % local), "LOCAL_SIZE": str(local)}
        environ = common | own | {"CROSS_RANK": str(rank // local), "DS_ACCELERATOR": "cpu"}
        words = ["ip", "netns", "exec", names[rank // local], *command]
        processes.append(
            subprocess.Popen(
                words, env=environ, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
            )
        )
    errors = [process.communicate()[1] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit(b"\n".join(errors).decode(errors="replace")[-4000:])
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def rank_program(base: str, out: str) -> None:
    """Time steps on this rank, and the link by one all-gather of known size."""
    import io

    import torch
    import torch.distributed as dist

    from trainer.config import RunConfig
    from trainer.data.token_table import Example
    from trainer.distributed.deepspeed_engine import Engine
    from trainer.distributed.model_loading import load_base
    from trainer.distributed.placement import LIVE_LAYERS
    from trainer.model.checkpoint_files import open_base
    from trainer.packing.packed_row import PackedRow
    from trainer.prompts.soft_prompt import VirtualTokens
    from trainer.runtime.console import Console
    from trainer.training.step import step_gradients

    rows = "examples/data/triage.valid.jsonl"
    config = RunConfig.model_validate(
        {
            "output_dir": "-",
            "base": {"model": base, "matmul": "dequantize"},
            "engine": {"shard_group": "world"},
            "tasks": [{"name": "t", "train": rows, "input": "{text}", "target": "{label}"}],
            "prompts": [{"name": "p", "task": "t", "num_virtual_tokens": 8}],
            "training": {"steps": 1},
        }
    )
    engine = Engine(600)
    files = open_base(config.base)
    console = Console(io.StringIO(), io.StringIO(), shown=False)
    loaded = load_base(engine, files, config, console, kept_bytes=0)
    count, length = engine.world_size * ROWS_PER_RANK, ROW_TOKENS
    ids = torch.randint(3, 300, (count, length), generator=torch.Generator().manual_seed(0))
    packed = [
        PackedRow(Example.with_target(tuple(row), length // 2, i), 0, i)
        for i, row in enumerate(ids.tolist())
    ]
    prompt = VirtualTokens(torch.randn(8, loaded.model.hidden_size) * 0.02)
    seconds = []
    for step in range(2 + STEPS):
        dist.barrier()
        started, before = time.perf_counter(), (engine.gathered_bytes, engine.exchanged_bytes)
        step_gradients(engine, loaded.model, packed, [prompt], 8 + ROWS_PER_RANK * length)
        if step >= 2:
            seconds.append(time.perf_counter() - started)
    exchanged = engine.exchanged_bytes - before[1]
    share = (engine.world_size - 1) / engine.world_size
    layers = [
        share * sum(p.ds_numel * p.ds_tensor.element_size() for p in layer.parameters())
        for layer in loaded.model.model.model.layers
    ]
    part = torch.zeros(PROBE_BYTES // engine.world_size, dtype=torch.uint8)
    probe = torch.zeros(len(part) * engine.world_size, dtype=torch.uint8)
    times = []
    for _ in range(3):
        dist.barrier()
        started = time.perf_counter()
        dist.all_gather_into_tensor(probe, part)
        times.append(time.perf_counter() - started)
    if engine.is_main:
        result = {
            "seconds": statistics.median(seconds),
            "every": seconds,
            "rate": share * PROBE_BYTES / min(times),
            "probe_bytes": PROBE_BYTES,
            "layers": layers,
            "gathered": engine.gathered_bytes - before[0],
            "exchanged": exchanged,
            "live_layers": LIVE_LAYERS,
        }
        Path(out).write_text(json.dumps(result))
    engine.close()


if __name__ == "__main__":
    from trainer.runtime.process import flush_and_exit

    rank_program(*sys.argv[1:])
    flush_and_exit(0)
