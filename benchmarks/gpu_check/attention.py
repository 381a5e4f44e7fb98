"""FlexAttention and bucketed attention over the same packed batches: time, memory, difference."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.attention import flex_attention

from benchmarks.gpu_check.part import Check
from benchmarks.gpu_check.sizes import VIRTUAL_TOKENS, Sizes
from benchmarks.gpu_check.timing import median_seconds
from benchmarks.peers.rows import make_rows
from trainer.model.attention.bucket_layout import Scores
from trainer.model.attention.interface import Layout, attend, make_layout, with_flex
from trainer.packing.packed_batch import Segment

#: Largest difference of outputs and gradients, relative to the largest value. In bfloat16, the
#: gradients of the prompt's keys are sums of many rounded numbers. A wrong mask gives about 1.
ACCEPTABLE_DIFFERENCE = 0.1


def attention(check: Check) -> None:
    """Compare both for rows of median length 60 and for long rows.

    Raises:
        RuntimeError: if one of them cannot run, or their results differ.
    """
    tokens, long = check.sizes.attention_tokens, check.sizes.long_row
    cases = {
        "median 60": _fill(tokens, (len(row.input_ids) for row in make_rows(tokens, 300))),
        f"{long:,} each": _fill(tokens, itertools.repeat(long)),
    }
    rows: list[dict[str, Any]] = []
    problems = []
    with _eager_flex(check):
        for case, lengths in cases.items():
            row = compare(case, lengths, check)
            rows.append(row)
            check.save({"tokens": tokens, "rows": rows})
            problems += [f"{case}: {problem}" for problem in row["problems"]]
    if problems:
        raise RuntimeError("; ".join(problems))


def _fill(tokens: int, lengths: Iterator[int]) -> list[int]:
    """Return row lengths whose sum, with the prompt, is ``tokens``."""
    chosen, left = [], tokens - VIRTUAL_TOKENS
    while left > 0:
        chosen.append(min(left, next(lengths)))
        left -= chosen[-1]
    return chosen


@contextmanager
def _eager_flex(check: Check) -> Iterator[None]:
    """On the CPU, let FlexAttention run its backward in eager mode, which torch refuses."""
    if not check.small:
        yield
        return
    with (
        patch.object(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True),
        patch.object(flex_attention, "_validate_device", lambda *_: None),
    ):
        yield


def compare(case: str, lengths: Sequence[int], check: Check) -> dict[str, Any]:
    """Measure forward and backward of one layer; a failure is reported under "problems"."""
    prompt = Segment(0, VIRTUAL_TOKENS)
    segments = [prompt]
    for length in lengths:
        segments.append(Segment(segments[-1].end, length, prompt))
    device, rounds = check.device, check.sizes.rounds
    leaves = _leaves(check.sizes, device)
    measured: dict[str, dict[str, float]] = {}
    results: dict[str, list[Tensor]] = {}
    problems = []
    for kind in ("buckets", "flex"):
        try:
            build = _builder(kind, segments, device)
            layout = build()
            run = _runner(leaves, layout)
            results[kind] = run()
            measured[kind] = {
                "seconds": median_seconds(run, device, rounds),
                "peak_bytes": _peak_bytes(run, device),
                "layout_seconds": _host_seconds(build, device),
            }
        except Exception as error:  # of the compiler, the kernel, or the allocator
            problems.append(f"{kind}: {type(error).__name__}: {str(error).strip()[:300]}")
    difference = None
    if len(results) == 2:
        pairs = zip(results["flex"], results["buckets"], strict=True)
        difference = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
        if not difference <= ACCEPTABLE_DIFFERENCE:  # also NaN
            problems.append(f"flex differs from buckets by {difference:.1%}")
    return {
        "rows": case,
        "num_rows": len(lengths),
        "measured": measured,
        "difference": difference,
        "problems": problems,
    }


def _leaves(sizes: Sizes, device: torch.device) -> list[Tensor]:
    """Return random query, key and value [1, heads, T, D]."""
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    drawn = [
        torch.randn(1, heads, sizes.attention_tokens, sizes.head_size, generator=generator)
        for heads in (sizes.heads, sizes.kv_heads, sizes.kv_heads)
    ]
    return [tensor.to(device, dtype).requires_grad_() for tensor in drawn]


def _builder(kind: str, segments: list[Segment], device: torch.device) -> Callable[[], Layout]:
    """Return a function that computes what all layers of a packed batch share."""

    def build() -> Layout:
        layout = make_layout(segments, device)
        if kind == "buckets":
            return layout
        layout = with_flex(layout, segments)
        assert layout.flex is not None
        layout.flex.block_mask(None)
        return layout

    return build


def _runner(leaves: list[Tensor], layout: Layout) -> Callable[[], list[Tensor]]:
    scores = Scores(leaves[0].shape[-1] ** -0.5)
    query, key, value = leaves
    shape = query.transpose(1, 2).shape  # of the output
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn(shape, generator=generator).to(query.device, query.dtype)

    def run() -> list[Tensor]:
        output = attend(query, key, value, layout, scores, 0)
        gradients = torch.autograd.grad(output, leaves, upstream)
        return [output.detach(), *gradients]

    return run


def _peak_bytes(run: Callable[[], object], device: torch.device) -> float:
    """Return the peak memory of a call above what was allocated before; 0 on the CPU."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    return torch.cuda.max_memory_allocated(device) - before


def _host_seconds(build: Callable[[], object], device: torch.device) -> float:
    """Return the seconds until the host has built a layout."""
    started = time.perf_counter()
    build()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
