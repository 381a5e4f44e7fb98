"""Cost of a step: FLOPs, and the shares of products, attention, head and loops."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.peers.counters import FlopCounter, part_of
from benchmarks.unsharded_base import load_unsharded
from trainer.data.token_table import Example
from trainer.distributed.prefetch import prepare_batch
from trainer.model.layers.matmul_selection import resolve_matmul, use_matmul
from trainer.packing.packed_row import PackedRow
from trainer.prompts.soft_prompt import VirtualTokens, prompt_lengths
from trainer.training.step import batch_objective

#: Steps before the profiled one: the first compiles.
WARM_UP = 2


def step_costs(folder: Path, rows: list[Example], num_virtual_tokens: int) -> dict[str, Any]:
    """Measure one step on the rows of an update, with the default base on one thread.

    Returns:
        ``train_flops`` and ``score_flops`` per text token, and shares of time of both.
    """
    base = load_unsharded(folder, "int8")
    cpu = torch.device("cpu")
    hidden = base.hidden_size
    use_matmul(base, resolve_matmul("auto", "int8", cpu, hidden), 6.0)
    prompt = VirtualTokens(torch.nn.Parameter(torch.randn(num_virtual_tokens, hidden) * 0.1))
    packed = [PackedRow(row, 0, i) for i, row in enumerate(rows)]
    batch = prepare_batch(packed, prompt_lengths([prompt]), cpu)
    counts = [sum(row.num_labels for row in rows)]

    def train() -> None:
        loss, _ = batch_objective(base, batch, [prompt], counts)
        loss.backward()

    @torch.no_grad()
    def read() -> None:
        batch_objective(base, batch, [prompt], counts)

    tokens = sum(row.num_tokens for row in rows)
    return {
        "text_tokens": tokens,
        "train_flops": _flops(train) / tokens,
        "score_flops": _flops(read) / tokens,
        "train_shares": _shares(train, base.vocab_size),
        "score_shares": _shares(read, base.vocab_size),
    }


def _flops(work: Callable[[], None]) -> int:
    torch.compiler.set_stance("force_eager")  # fused operators would not be counted
    with FlopCounter() as counter:
        work()
    torch.compiler.set_stance("default")
    return counter.total


def _shares(work: Callable[[], None], vocabulary: int) -> dict[str, float]:
    for _ in range(WARM_UP):
        work()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, record_shapes=True) as recorded:
        work()
    parts = ("products", "quantization", "attention", "head", "loops", "rest")
    seconds = dict.fromkeys(parts, 0.0)
    for event in recorded.events():
        kind = part_of(event)
        if any(vocabulary in shape for shape in event.input_shapes if isinstance(shape, list)):
            kind = "head"
        seconds[kind if kind in seconds else "rest"] += event.self_cpu_time_total
    total = sum(seconds.values())
    return {kind: round(value / total, 3) for kind, value in seconds.items()}
