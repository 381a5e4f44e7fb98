"""The check's results as one JSON and one Markdown document."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from benchmarks import matmul
from benchmarks.gpu_check.int8_base import linear_shapes
from benchmarks.gpu_check.sizes import VIRTUAL_TOKENS

Record = dict[str, Any]
TRAINING = "train_"


def summarize(records: Sequence[Record], shape: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Return the JSON document; adds the shares of the roofline to the training runs.

    A frozen base costs 4 FLOPs per parameter and token: forward and input-gradient, 2 each.
    """
    results = {record["name"]: record["result"] or {} for record in records}
    card = results.get("card", {})
    parameters = shape["num_hidden_layers"] * sum(map(math.prod, linear_shapes(shape).values()))
    for name, result in results.items():
        if name.startswith(TRAINING) and "useful_tokens_per_second" in result:
            for kind, peak in card.get("flops_per_second", {}).items():
                flops = 4 * parameters * result["useful_tokens_per_second"]
                result[f"share_of_{kind}_roofline"] = flops / peak
    return {
        "card": card.get("card", "unknown card"),
        "linear_parameters": parameters,
        "seconds": round(seconds, 1),
        "parts": list(records),
    }


def page(report: dict[str, Any]) -> str:
    """Render the Markdown document."""
    records = {record["name"]: record for record in report["parts"]}
    results = {name: record["result"] for name, record in records.items() if record["result"]}
    bad = [name for name, record in records.items() if record["status"] != "passed"]
    lines = [
        f"# Check of {report['card']}",
        "",
        f"`make gpu-check`, {report['seconds']:.0f} s. "
        + (f"Not passed: {', '.join(bad)}." if bad else "All parts passed."),
        "",
        "| part | what | outcome | seconds | reason |",
        "|---|---|---|---|---|",
    ]
    for name, record in records.items():
        cells = [name, record["about"], record["status"], f"{record['seconds']:.0f}"]
        lines.append(f"| {' | '.join([*cells, _cell(record['reason'] or '')])} |")
    sections = {
        "card": _card,
        "tests": _tests,
        "products": _products,
        "attention": _attention,
        "out_of_memory": _out_of_memory,
    }
    for name, section in sections.items():
        if name in results:
            lines += ["", *section(results[name])]
    runs = {name: result for name, result in results.items() if name.startswith(TRAINING)}
    if runs:
        lines += ["", *_training(runs, report["linear_parameters"])]
    return "\n".join([*lines, ""])


def _cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")[:300]


def _card(result: Record) -> list[str]:
    speeds = result["flops_per_second"]
    peaks = ", ".join(f"{1e-12 * speed:.1f} TFLOP/s in {kind}" for kind, speed in speeds.items())
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    return ["## Card", "", f"A large matrix product: {peaks or 'not measured'}. {versions}."]


def _tests(result: Record) -> list[str]:
    counts = ", ".join(f"{count} {outcome}" for outcome, count in result["counts"].items())
    return ["## tests/gpu", "", f"{counts}.", *(f"- failed: `{name}`" for name in result["failed"])]


def _products(result: Record) -> list[str]:
    rows = result["rows"]
    flops = sum(row["flops"] for row in rows)
    speeds = [f"{kind} {1e-12 * flops / s:.1f}" for kind, s in matmul.totals(rows).items()]
    chosen = result.get("auto")
    return [
        "## Products with int8 weights",
        "",
        f"Forward and input-gradient, {result['tokens']:,} tokens, quantization of activations "
        f"included. TFLOP/s of all layers: {', '.join(speeds)}."
        + (f" `base.matmul: auto` takes {chosen['kind']} ({chosen['reason']})." if chosen else ""),
        "",
        *matmul.table(rows),
    ]


def _attention(result: Record) -> list[str]:
    lines = [
        "## Attention",
        "",
        f"One layer, forward and backward, {result['tokens']:,} tokens packed with a prompt of "
        f"{VIRTUAL_TOKENS} virtual tokens. The layout is computed once per packed batch.",
        "",
        "| rows | kind | ms | peak, MB | layout, ms | difference |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        for kind, measured in row["measured"].items():
            difference = row["difference"] if kind == "flex" else None
            cells = [
                f"{row['num_rows']} of {row['rows']}",
                kind,
                f"{1e3 * measured['seconds']:.2f}",
                f"{measured['peak_bytes'] / 1e6:.0f}",
                f"{1e3 * measured['layout_seconds']:.2f}",
                "" if difference is None else f"{difference:.1e}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def _out_of_memory(result: Record) -> list[str]:
    return [
        "## Out of memory",
        "",
        f"A step of {result['tokens']:,} tokens needs {result['peak_bytes'] / 1e9:.2f} GB for "
        f"activations. With {result['left_bytes'] / 1e9:.2f} GB left it was split "
        f"{result['splits']} time(s), and {result['splits_after']} time(s) when the memory was "
        f"free again. The loss differs by {result['loss_difference']:.1e}, the gradient by "
        f"{result['gradient_difference']:.1e}.",
    ]


def _training(runs: dict[str, Record], parameters: int) -> list[str]:
    lines = [
        "## Training",
        "",
        f"A base of {parameters / 1e9:.2f}B parameters in its layers, in 8 bits, "
        f"{VIRTUAL_TOKENS} virtual tokens per prompt, rows of median 60 tokens. Useful tokens are "
        "neither padding nor virtual. The roofline is 4 FLOPs per parameter and useful token at "
        "the speed of the large product.",
        "",
        "| part | prompts | tokens per step | useful tokens/s | median step, s | of the bf16 "
        "roofline | of the int8 roofline | base, GB | peak, GB | load, s | loss |",
        "|---" * 11 + "|",
    ]
    for name, run in runs.items():
        shares = [run.get(f"share_of_{kind}_roofline") for kind in ("bf16", "int8")]
        peak = run["peak_gpu_bytes"]
        cells = [
            name,
            f"{run['prompts']}",
            f"{run['tokens_per_step']:,}",
            f"{run['useful_tokens_per_second']:,.0f}",
            f"{run['step_seconds']:.3f}",
            *("" if share is None else f"{share:.2f}" for share in shares),
            f"{run['base_bytes_per_rank'] / 1e9:.2f}",
            f"{peak / 1e9:.2f}" if peak else "",
            f"{run['load_seconds']:.1f}",
            f"{run['train_loss']:.4f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    bank, one = runs.get("train_bank"), runs.get("train_one")
    if bank and one:
        ratio = bank["useful_tokens_per_second"] / one["useful_tokens_per_second"]
        lines += [
            "",
            f"{bank['prompts']} prompts in one run: {ratio:.2f} times the useful tokens/s of one "
            "prompt with as many tokens per prompt.",
        ]
    return lines
