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
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import nn

from trainer.model.layers.linear import FrozenLinear
from trainer.model.layers.matmul_selection import use_matmul
from trainer.model.layers.quantization import quantize_rows

SIZES = {  # tokens, type and (N, K) of the layers
    "cpu": (1024, torch.float32, {"attention": (768, 768), "up": (2048, 768), "down": (768, 2048)}),
    "cuda": (
        8192,
        torch.bfloat16,
        {"attention": (4096, 4096), "up": (14336, 4096), "down": (4096, 14336)},
    ),
}
KINDS = ("dequantize", "int8", "int8_outliers", "bitsandbytes")
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

    def __init__(self, shape: tuple[int, int], kind: str, device: torch.device) -> None:
        self.layer, self.device = make_layer(shape, kind, device), device
        self.tokens, self.dtype, _ = SIZES[device.type]
        self.seconds: list[float] = []

    def run(self) -> None:
        options = {"device": self.device, "dtype": self.dtype}
        x = torch.randn(self.tokens, self.layer.in_features, **options)
        x[:, :OUTLIER_FEATURES] *= 10 * THRESHOLD
        x.requires_grad_()
        dy = torch.randn(self.tokens, self.layer.out_features, **options)
        self._wait()
        started = time.perf_counter()
        torch.autograd.grad(self.layer(x), x, dy)
        self._wait()
        self.seconds.append(time.perf_counter() - started)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def measure(shape: tuple[int, int], name: str, rounds: int, device: torch.device) -> dict[str, Any]:
    arms = [Arm(shape, kind, device) for kind in KINDS]
    for round_ in track(range(WARM_UP + rounds), description=name):
        for arm in arms:
            if round_ == WARM_UP:  # compilation is done, and caches are filled
                arm.seconds.clear()
            arm.run()
    medians = {kind: statistics.median(arm.seconds) for kind, arm in zip(KINDS, arms, strict=True)}
    return {"shape": name, "size": shape, "seconds": medians}


def table(rows: list[dict[str, Any]], where: str, tokens: int) -> str:
    def line(label: str, seconds: dict[str, float]) -> str:
        shares = [seconds[kind] / seconds["dequantize"] for kind in KINDS[1:]]
        cells = [*(f"{1e3 * seconds[kind]:.2f}" for kind in KINDS), *(f"{s:.2f}" for s in shares)]
        return f"| {' | '.join([label, *cells])} |"

    milliseconds = [f"{kind}, ms" for kind in KINDS]
    ratios = [f"{kind} / dequantize" for kind in KINDS[1:]]
    total = {kind: sum(row["seconds"][kind] for row in rows) for kind in KINDS}
    lines = [
        f"# Frozen linear layer, {tokens:,} tokens, {where}",
        "",
        "`python -m benchmarks.matmul`: forward and input-gradient, median of interleaved rounds.",
        "",
        f"| {' | '.join(['layer (N, K)', *milliseconds, *ratios])} |",
        "|---" * (1 + len(milliseconds) + len(ratios)) + "|",
        *(line(f"{row['shape']} {row['size']}", row["seconds"]) for row in rows),
        line("all", total),
        "",
        f"To reach: int8 / dequantise <= {REACH}.",
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

    tokens, _, shapes = SIZES[device.type]
    rows = [measure(shape, name, args.rounds, device) for name, shape in shapes.items()]
    on_gpu = device.type == "cuda"
    where = torch.cuda.get_device_name(device) if on_gpu else f"{args.threads} CPU thread(s)"
    report = {"device": where, "tokens": tokens, "threads": args.threads, "rows": rows}
    name = "matmul_cuda" if on_gpu else "matmul"
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n")
    (args.out / f"{name}.md").write_text(table(rows, where, tokens))
    print(table(rows, where, tokens))


if __name__ == "__main__":
    main()
