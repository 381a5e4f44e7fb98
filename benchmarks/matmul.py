"""Time of a frozen linear layer, int8 product against dequantise-then-multiply.

    python -m benchmarks.matmul [--threads N] [--rounds N]

Forward and input-gradient at the shapes of a 110M-parameter Llama (hidden 768, intermediate 2048),
1,024 tokens, quantisation of activations and output gradients included. The two take turns in every
round, so that other load on the machine meets both; the median over rounds is shown, and the table
and JSON go to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from rich.progress import track
from torch import nn

from trainer.base.linear import FrozenLinear
from trainer.base.quantization import quantize_rows

TOKENS = 1024
SHAPES = {"attention": (768, 768), "up": (2048, 768), "down": (768, 2048)}
REACH = 0.5
WARM_UP = 3
RESULTS = Path(__file__).parent / "results"


def make_layer(out_features: int, in_features: int, int8: bool) -> FrozenLinear:
    stored, absmax = quantize_rows(torch.randn(out_features, in_features) * 0.02)
    layer = FrozenLinear(in_features, out_features, bias=False, quantized=True)
    layer.weight = nn.Parameter(stored, requires_grad=False)
    layer.absmax = absmax
    layer.int8_matmul = int8
    return layer


class Arm:
    """One way to multiply, and the seconds of its forwards with input-gradient."""

    def __init__(self, shape: tuple[int, int], int8: bool) -> None:
        self.layer = make_layer(*shape, int8=int8)
        self.seconds: list[float] = []

    def run(self) -> None:
        x = torch.randn(TOKENS, self.layer.in_features).requires_grad_()
        dy = torch.randn(TOKENS, self.layer.out_features)
        started = time.perf_counter()
        torch.autograd.grad(self.layer(x), x, dy)
        self.seconds.append(time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=30)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    rows = []
    for name, shape in SHAPES.items():
        arms = [Arm(shape, int8=False), Arm(shape, int8=True)]
        for round_ in track(range(WARM_UP + args.rounds), description=name):
            for arm in arms:
                if round_ == WARM_UP:  # compiled, and caches are warm
                    arm.seconds.clear()
                arm.run()
        medians = [statistics.median(arm.seconds) for arm in arms]
        rows.append({"shape": name, "size": shape, "exact_s": medians[0], "int8_s": medians[1]})

    total = sum(row["int8_s"] for row in rows) / sum(row["exact_s"] for row in rows)
    report = {"threads": args.threads, "tokens": TOKENS, "rows": rows, "ratio": total}
    lines = [
        f"# Frozen linear layer, {TOKENS:,} tokens, {args.threads} CPU thread(s)",
        "",
        "`python -m benchmarks.matmul`: forward and input-gradient, median of interleaved rounds.",
        "",
        "| layer (N, K) | dequantise, ms | int8, ms | int8 / dequantise |",
        "|---|---|---|---|",
        *(
            f"| {row['shape']} {row['size']} | {row['exact_s'] * 1e3:.1f} | "
            f"{row['int8_s'] * 1e3:.1f} | {row['int8_s'] / row['exact_s']:.2f} |"
            for row in rows
        ),
        f"| all | | | {total:.2f} (to reach: <= {REACH}) |",
        "",
    ]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "matmul.json").write_text(json.dumps(report, indent=2) + "\n")
    (RESULTS / "matmul.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
