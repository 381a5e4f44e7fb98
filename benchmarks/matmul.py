"""Time of a frozen linear layer: int8 products against dequantize-then-multiply.

    python -m benchmarks.matmul [--threads N] [--rounds N] [--device cuda] [--out FOLDER]

Forward and input-gradient at the shapes of a 110M-parameter Llama (hidden 768, intermediate 2048),
1,024 tokens, quantization of activations and output gradients included; on a GPU at those of an 8B
one (4,096 and 14,336), 8,192 tokens, in bfloat16. Six input features are outliers, as LLM.int8()
found in models of 6.7B parameters (arXiv 2208.07339, section 4). The kinds take turns in every
round, so that other load affects all of them; the median over rounds is shown, and the table
and JSON go to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import nn

from trainer.model.layers.linear import FrozenLinear
from trainer.model.layers.matmul_selection import use_matmul
from trainer.model.layers.quantization import quantize_rows


@dataclass(frozen=True)
class Work:
    """Number of tokens, compute type, and (N, K) of each layer."""

    tokens: int
    dtype: torch.dtype
    shapes: dict[str, tuple[int, int]]

    def flops(self, name: str) -> int:
        """Return the FLOPs of forward and input-gradient of one layer."""
        return 4 * self.tokens * math.prod(self.shapes[name])


SIZES = {
    "cpu": Work(
        1024, torch.float32, {"attention": (768, 768), "up": (2048, 768), "down": (768, 2048)}
    ),
    "cuda": Work(
        8192,
        torch.bfloat16,
        {"attention": (4096, 4096), "up": (14336, 4096), "down": (4096, 14336)},
    ),
}
KINDS = ("dequantize", "int8", "int8x2", "int8_outliers", "bitsandbytes")
THRESHOLD = 6.0
OUTLIER_FEATURES = 6
REACH = 0.5
WARM_UP = 3
RESULTS = Path(__file__).parent / "results"


def make_layer(shape: tuple[int, int], kind: str, device: torch.device) -> FrozenLinear:
    out_features, in_features = shape
    stored, absmax = quantize_rows(torch.randn(out_features, in_features, device=device) * 0.02)
    layer = FrozenLinear(in_features, out_features, bias=False, quantized=True)
    layer.weight = nn.Parameter(stored, requires_grad=False)
    layer.absmax = absmax
    use_matmul(layer, kind, THRESHOLD)
    return layer


class Arm:
    """One kind of matrix product, and the seconds of each forward with input-gradient."""

    def __init__(self, work: Work, name: str, kind: str, device: torch.device) -> None:
        self.kind, self.work, self.device = kind, work, device
        self.layer = make_layer(work.shapes[name], kind, device)
        self.seconds: list[float] = []

    def run(self) -> None:
        options: dict[str, Any] = {"device": self.device, "dtype": self.work.dtype}
        x = torch.randn(self.work.tokens, self.layer.in_features, **options)
        x[:, :OUTLIER_FEATURES] *= 10 * THRESHOLD
        x.requires_grad_()
        dy = torch.randn(self.work.tokens, self.layer.out_features, **options)
        self._wait()
        started = time.perf_counter()
        torch.autograd.grad(self.layer(x), x, dy)
        self._wait()
        self.seconds.append(time.perf_counter() - started)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def measure(
    work: Work,
    name: str,
    rounds: int,
    device: torch.device,
    kinds: Sequence[str] = KINDS,
    *,
    warm_up: int = WARM_UP,
) -> dict[str, Any]:
    """Time one layer with each kind of product; a kind that raises is reported under "failures"."""
    arms = [Arm(work, name, kind, device) for kind in kinds]
    failures: dict[str, str] = {}
    for round_ in track(range(warm_up + rounds), description=name):
        for arm in arms:
            if arm.kind in failures:
                continue
            if round_ == warm_up:  # compilation is done, and caches are filled
                arm.seconds.clear()
            try:
                arm.run()
            except Exception as error:  # no library, no kernel, a compiler's error, out of memory
                failures[arm.kind] = f"{type(error).__name__}: {str(error).strip()[:300]}"
    seconds = {arm.kind: statistics.median(arm.seconds) for arm in arms if arm.kind not in failures}
    return {
        "shape": name,
        "size": work.shapes[name],
        "flops": work.flops(name),
        "seconds": seconds,
        "failures": failures,
    }


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Render the times of all layers, and their ratios to ``dequantize``, as a Markdown table."""
    kinds = [kind for kind in KINDS if any(kind in row["seconds"] for row in rows)]
    compared = [kind for kind in kinds if kind != "dequantize" and "dequantize" in kinds]

    def line(label: str, seconds: dict[str, float]) -> str:
        cells = [f"{1e3 * seconds[kind]:.2f}" if kind in seconds else "failed" for kind in kinds]
        for kind in compared:
            both = kind in seconds and "dequantize" in seconds
            cells.append(f"{seconds[kind] / seconds['dequantize']:.2f}" if both else "")
        return f"| {' | '.join([label, *cells])} |"

    head = [f"{kind}, ms" for kind in kinds] + [f"{kind} / dequantize" for kind in compared]
    return [
        f"| {' | '.join(['layer (N, K)', *head])} |",
        "|---" * (1 + len(head)) + "|",
        *(line(f"{row['shape']} {tuple(row['size'])}", row["seconds"]) for row in rows),
        line("all", totals(rows)),
    ]


def totals(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the seconds of all layers by kind, without kinds that failed for a layer."""
    kinds = [kind for kind in KINDS if all(kind in row["seconds"] for row in rows)]
    return {kind: sum(row["seconds"][kind] for row in rows) for kind in kinds}


def page(rows: Sequence[dict[str, Any]], where: str, tokens: int) -> str:
    """Render the results as a Markdown document."""
    lines = [
        f"# Frozen linear layer, {tokens:,} tokens, {where}",
        "",
        "`python -m benchmarks.matmul`: forward and input-gradient, median of interleaved rounds.",
        "",
        *table(rows),
        "",
        f"To reach: int8 / dequantize <= {REACH}.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--device", choices=sorted(SIZES), default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)

    work = SIZES[device.type]
    rows = [measure(work, name, args.rounds, device) for name in work.shapes]
    on_gpu = device.type == "cuda"
    where = torch.cuda.get_device_name(device) if on_gpu else f"{args.threads} CPU thread(s)"
    report = {"device": where, "tokens": work.tokens, "threads": args.threads, "rows": rows}
    name = "matmul_cuda" if on_gpu else "matmul"
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n")
    (args.out / f"{name}.md").write_text(page(rows, where, work.tokens))
    print(page(rows, where, work.tokens))


if __name__ == "__main__":
    main()
