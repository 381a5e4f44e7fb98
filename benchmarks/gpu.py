"""Speed, memory and share of the roofline on GPUs: complete runs on an int8 base of 8B shape.

    python -m benchmarks.gpu [--processes N] [--steps 12] [--only int8-sdpa ...]
    python -m benchmarks.gpu --quick      # a small base, also without a GPU; writes nothing

The base model has the shape of Llama 3.1 8B and random weights, in a temporary int8 folder (9 GB).
Each arm is one ``promptshard train`` on the same rows (log-normal lengths, median 60 tokens,
maximum 512) with 20 virtual tokens; the arms differ in matrix product and attention. The roofline
is the speed of a large matrix product on the same card: a frozen base model costs 4 FLOPs per
parameter and token (forward and input-gradient).
Writes a table and JSON with the card's name to benchmarks/results/, or to ``--out``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from benchmarks.figures import machine
from benchmarks.peers.rows import ANSWER, make_rows
from benchmarks.random_base import VOCAB_SIZE, llama_config, make_tokenizer

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SHAPE = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
QUICK_SHAPE = SHAPE | {"vocab_size": VOCAB_SIZE, "hidden_size": 64, "intermediate_size": 128}
QUICK_SHAPE |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
ARMS = {
    "int8-sdpa": {"base.matmul": "int8", "engine.attention": "sdpa"},
    "dequantize-sdpa": {"base.matmul": "dequantize", "engine.attention": "sdpa"},
    "int8-flex": {"base.matmul": "int8", "engine.attention": "flex"},
    "dequantize-flex": {"base.matmul": "dequantize", "engine.attention": "flex"},
    "int8_outliers-sdpa": {"base.matmul": "int8_outliers", "engine.attention": "sdpa"},
}
QUICK_ARMS = ("int8-sdpa", "dequantize-sdpa")
VIRTUAL, ROWS, TOKENS_PER_STEP = 20, 2000, 32_768
#: Steps for compilation and caches, which are not timed.
WARM_UP = 4
#: Size of the square matrix product that measures the GPU's peak speed, and number of timings.
SIDE, TIMES = 8192, 10


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", type=int, default=max(1, torch.cuda.device_count()))
    parser.add_argument("--steps", type=int, default=12, help=f"the first {WARM_UP} are not timed")
    parser.add_argument("--only", nargs="+", choices=ARMS, help="arms; default: all")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it works")
    given = parser.parse_args()
    if not given.quick and not torch.cuda.is_available():
        parser.error("there is no GPU; --quick runs a small base without one")
    if given.steps <= WARM_UP:
        parser.error(f"--steps: more than {WARM_UP}")
    shape = QUICK_SHAPE if given.quick else SHAPE
    names = given.only or (QUICK_ARMS if given.quick else list(ARMS))
    with tempfile.TemporaryDirectory(prefix="promptshard-gpu-") as temporary:
        folder = Path(temporary)
        started = time.perf_counter()
        make_int8_base(folder / "base", shape)
        print(f"base written in {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
        write_rows(folder / "rows.jsonl")
        arms = {}
        for name in names:
            print(f"{name} ...", file=sys.stderr, flush=True)
            arms[name] = run(folder, name, given.processes, given.steps, quick=given.quick)
    report = summary(shape, given.processes, arms, card_speeds(quick=given.quick))
    if not given.quick:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
        (given.out / "gpu.md").write_text(table(report))
    print(table(report))


def make_int8_base(folder: Path, shape: dict[str, Any]) -> None:
    """Write random int8 weights and row scales, as transformers and bitsandbytes save them.

    Writes one file per layer, to hold only one layer in memory. Row scales give weights of about
    1 / sqrt(inputs), so that activations have the magnitude of a trained model's.
    """
    folder.mkdir()
    config = llama_config(**shape)
    written = json.loads(config.to_json_string()) | {
        "architectures": ["LlamaForCausalLM"],
        "quantization_config": {
            "quant_method": "bitsandbytes",
            "load_in_8bit": True,
            "llm_int8_threshold": 0.0,
            "llm_int8_skip_modules": ["lm_head"],
        },
    }
    (folder / "config.json").write_text(json.dumps(written))
    make_tokenizer().save_pretrained(folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(device).manual_seed(0)
    weight_map = {}
    for number, tensors in enumerate(_parts(shape, device, generator)):
        name = f"model-{number:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _parts(
    shape: dict[str, Any], device: torch.device, generator: torch.Generator
) -> Iterator[dict[str, torch.Tensor]]:
    hidden, vocab = shape["hidden_size"], shape["vocab_size"]

    def words() -> torch.Tensor:
        drawn = torch.randn(vocab, hidden, device=device, generator=generator) * 0.02
        return drawn.bfloat16().cpu()

    yield {"model.embed_tokens.weight": words(), "model.norm.weight": _ones(hidden)}
    yield {"lm_head.weight": words()}
    for layer in range(shape["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        part = {
            f"{prefix}.{norm}_layernorm.weight": _ones(hidden)
            for norm in ("input", "post_attention")
        }
        for name, (rows, columns) in linear_shapes(shape).items():
            weight = f"{prefix}.{name}.weight"
            part[weight] = torch.randint(
                -127, 128, (rows, columns), dtype=torch.int8, device=device, generator=generator
            ).cpu()
            part[f"{prefix}.{name}.SCB"] = torch.full((rows,), (3.0 / columns) ** 0.5)
        yield part


def _ones(size: int) -> torch.Tensor:
    return torch.ones(size, dtype=torch.bfloat16)


def linear_shapes(shape: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Return the shape (rows, columns) of each linear layer in a Llama layer."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    keys = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    return {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }


def write_rows(path: Path) -> None:
    """Write rows of random words, of which the last ones are labels."""
    with path.open("w") as file:
        for row in make_rows(ROWS, VOCAB_SIZE):
            words = [f"w{token}" for token in row.input_ids]
            cut = max(1, len(words) - ANSWER)
            line = {"text": " ".join(words[:cut]), "label": " ".join(words[cut:])}
            file.write(json.dumps(line) + "\n")


def run(folder: Path, arm: str, processes: int, steps: int, *, quick: bool) -> dict[str, Any]:
    """Train one prompt; return memory, last loss, and speed of the steps after the warm-up."""
    output = folder / arm
    rows = str(folder / "rows.jsonl")
    config: dict[str, Any] = {
        "output_dir": str(output),
        "base": {"model": str(folder / "base")},
        "tasks": [
            {
                "name": "rows",
                "train": rows,
                "validation": rows,
                "max_validation_rows": 16,
                "input": "{text}",
                "target": " {label}",
            }
        ],
        "prompts": [
            {"name": "rows", "task": "rows", "num_virtual_tokens": VIRTUAL, "init": "vocab"}
        ],
        "training": {"steps": steps, "tokens_per_step": 2048 if quick else TOKENS_PER_STEP},
        "evaluation": {"every": steps},
        "checkpoint": {"every": steps},
        "tracking": {"system_metrics": False},
    }
    path = folder / f"{arm}.yaml"
    path.write_text(yaml.safe_dump(config))
    settings = [f"{key}={value}" for key, value in ARMS[arm].items()]
    command = [sys.executable, "-m", "launch", "train", str(path), *settings]
    command += ["--processes", str(processes)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"{done.stdout[-1500:]}\n{done.stderr[-3000:]}", file=sys.stderr, flush=True)
        return {"failed": done.returncode}
    results = json.loads((output / "summary.json").read_text())
    seconds, speed = _timed(output / "metrics.jsonl")
    return {
        "useful_tokens_per_second": speed,
        "step_seconds": seconds,
        "train_loss": _last(output / "metrics.jsonl", "train_loss"),
        "base_bytes_per_rank": results["memory"]["base_bytes_per_rank"],
        "peak_gpu_bytes": results["memory"]["peak_gpu_bytes"],
        "stream_tokens": results["memory"]["stream_tokens"],
        "gathered_bytes_per_step": results["communication"]["gathered_bytes_per_step"],
        "load_seconds": results["load"]["seconds"],
    }


def _timed(path: Path) -> tuple[float, float]:
    """Return the median step's seconds and the useful tokens per second after the warm-up."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    steps = [
        row["metrics"] for row in rows if "step_seconds" in row["metrics"] and row["step"] > WARM_UP
    ]
    seconds = [step["step_seconds"] for step in steps]
    tokens = [step["useful_tokens_per_second"] * step["step_seconds"] for step in steps]
    return statistics.median(seconds), sum(tokens) / sum(seconds)


def _last(path: Path, metric: str) -> float:
    rows = (json.loads(line)["metrics"] for line in path.read_text().splitlines())
    return float([row[metric] for row in rows if metric in row][-1])


def card_speeds(*, quick: bool) -> dict[str, float]:
    """Measure operations per second of a large matrix product in bf16 and in int8."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    side = 256 if quick else SIDE
    random = torch.randn(side, side, device=device)
    half = random.bfloat16()
    eighth = (random * 40).clamp(-127, 127).to(torch.int8)
    products: dict[str, Callable[[], torch.Tensor]] = {
        "bf16": lambda: half @ half,
        "int8": lambda: torch._int_mm(eighth, eighth.T),
    }
    return {kind: 2 * side**3 / _seconds(product, device) for kind, product in products.items()}


def _seconds(product: Callable[[], torch.Tensor], device: torch.device) -> float:
    seconds = []
    for _ in range(3 + TIMES):
        _wait(device)
        started = time.perf_counter()
        product()
        _wait(device)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[3:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def summary(
    shape: dict[str, Any],
    processes: int,
    arms: dict[str, dict[str, Any]],
    speeds: dict[str, float],
) -> dict[str, Any]:
    linear = sum(rows * columns for rows, columns in linear_shapes(shape).values())
    parameters = linear * shape["num_hidden_layers"]
    for name, arm in arms.items():
        if "failed" not in arm:
            flops = 4 * parameters * arm["useful_tokens_per_second"] / processes
            arm["share_of_roofline"] = flops / speeds["bf16"]
            if name.startswith("int8"):
                arm["share_of_int8_roofline"] = flops / speeds["int8"]
    on_gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if on_gpu else machine(),
        "torch": torch.__version__,
        "processes": processes,
        "linear_parameters": parameters,
        "shape": shape,
        "tokens_per_step": TOKENS_PER_STEP,
        "card_flops_per_second": speeds,
        "arms": arms,
    }


def table(report: dict[str, Any]) -> str:
    speeds = report["card_flops_per_second"]
    lines = [
        f"# Prompt tuning on {report['processes']} x {report['device']}",
        "",
        f"`python -m benchmarks.gpu`: a base of {report['linear_parameters'] / 1e9:.2f}B "
        f"parameters in its layers, in 8 bits, {VIRTUAL} virtual tokens, rows of median 60 tokens. "
        "Useful tokens are neither padding nor virtual. The roofline: 4 FLOPs per parameter and "
        f"useful token at {speeds['bf16'] / 1e12:.1f} TFLOP/s in bf16, "
        f"{speeds['int8'] / 1e12:.1f} TOP/s in int8, which a large product reached on the "
        "card in this run.",
        "",
        "| matmul-attention | useful tokens/s | median step, s | of the bf16 roofline | of the "
        "int8 roofline | base on a rank, GB | peak on a rank, GB | tokens of a stream | loss |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, arm in report["arms"].items():
        if "failed" in arm:
            lines.append(f"| {name} | failed with exit code {arm['failed']} |" + " |" * 7)
            continue
        int8, peak = arm.get("share_of_int8_roofline"), arm["peak_gpu_bytes"]
        cells = [
            f"{arm['useful_tokens_per_second']:,.0f}",
            f"{arm['step_seconds']:.3f}",
            f"{arm['share_of_roofline']:.2f}",
            "" if int8 is None else f"{int8:.2f}",
            f"{arm['base_bytes_per_rank'] / 1e9:.2f}",
            "" if peak is None else f"{peak / 1e9:.2f}",
            f"{arm['stream_tokens']:,}",
            f"{arm['train_loss']:.4f}",
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
