"""Table, plot and JSON of ``benchmarks.scaling``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.scaling.plans import GPUS, NETWORKS

RESULTS = Path(__file__).resolve().parents[1] / "results"
JSON = RESULTS / "scaling.json"
NETWORK_NAMES = {"ndr": "NDR, 8 x 50 GB/s", "hdr": "HDR, 8 x 25 GB/s", "100gbe": "100 GbE per node"}


def write(result: dict[str, Any]) -> str:
    """Write all files; return the Markdown."""
    JSON.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    text = markdown(result)
    (RESULTS / "scaling.md").write_text(text, encoding="utf-8")
    plot(result, RESULTS / "scaling.png")
    return text


def markdown(result: dict[str, Any]) -> str:
    bases = result["bases"]
    lines = [
        "# Sharding wider: plans and simulated gathers",
        "",
        f"`python -m benchmarks.scaling`: nodes of 8 {result['gpu']}, rows of "
        f"{result['row_tokens']} tokens, {result['tokens']:,} useful tokens per GPU, prompt and "
        "step. Memory and packed batches are those of `promptshard plan`. The simulation gathers "
        "layer by layer, one ahead. Nothing here was measured on a GPU.",
        "",
        "![useful tokens per second and GPU](scaling.png)",
        "",
        "Grey: some of these groups do not fit.",
        "",
        "## Shard group that `auto` takes, by number of GPUs",
        "",
        f"| base | {' | '.join(f'{n:,}' for n in GPUS)} |",
        "|---" * (len(GPUS) + 1) + "|",
        *(_auto_row(base) for base in bases),
        "",
        "In brackets: does not fit.",
        "",
        "## Useful tokens per second and GPU, by shard group",
        "",
        "Planned for NDR, then simulated by network with int8 on the wire, and with 16 bits.",
    ]
    for base in bases:
        lines += ["", f"### {base['name']}", "", *_group_table(base)]
    lines += ["", "## A bank of prompts", "", *_bank_table(bases)]
    lines += ["", "## Simulation against CPU ranks", "", *_traces(result)]
    return "\n".join(lines) + "\n"


def _auto_row(base: dict[str, Any]) -> str:
    fits = {row["group"]: row["fits"] for row in base["groups"]}
    groups = [base["auto"][key] for key in base["auto"]]
    cells = [f"{g}" if fits.get(g, True) else f"({g})" for g in groups]
    return f"| {base['name']} | {' | '.join(cells)} |"


def _group_table(base: dict[str, Any]) -> list[str]:
    names = [f"{NETWORK_NAMES[n]}: int8 | 16 bits" for n in NETWORKS]
    lines = [
        f"| group | GB per GPU | packed tokens | planned | {' | '.join(names)} |",
        "|---" * (4 + 2 * len(NETWORKS)) + "|",
    ]
    for row in base["groups"]:
        memory = f"{row['bytes'] / 1e9:.0f}" + ("" if row["fits"] else " (too much)")
        cells = [f"{row['group']:,}", memory, f"{row['micro_batch_tokens']:,}"]
        cells.append(_speed(row["planned"]))
        for network in NETWORKS:
            cells += [_speed(row["simulated"][network][wire]) for wire in ("int8", "16 bits")]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _bank_table(bases: list[dict[str, Any]]) -> list[str]:
    counts = [row["prompts"] for row in bases[0]["banks"]]
    lines = [
        "Simulated useful tokens per second and GPU, all prompts together, in a shard group of "
        "several nodes.",
        "",
        f"| base | group | network | {' | '.join(f'{k} prompt' + 's' * (k > 1) for k in counts)} |",
        "|---" * (3 + len(counts)) + "|",
    ]
    for base in bases:
        for network in NETWORKS:
            cells = [_speed(row["simulated"][network]["int8"]) for row in base["banks"]]
            name, group = base["name"], base["bank_group"]
            lines.append(f"| {name} | {group} | {NETWORK_NAMES[network]} | {' | '.join(cells)} |")
    return lines


def _traces(result: dict[str, Any]) -> list[str]:
    if not result["traces"]:
        return ["Not measured on this machine."]
    probe = result["traces"][0]["probe_bytes"] / 1e6
    lines = [
        f"Llama of 8 layers, hidden size 512, on {result['machine']}. Two network namespaces, "
        "joined by a cable whose senders `tc tbf` limits; the ranks are divided between them. The "
        f"rate is that of one all-gather of {probe:.0f} MB. The seconds of the fast link are those "
        "of the computations in the simulation.",
        "",
        "| ranks | link | measured rate, MB/s | load average | measured s/step | simulated | "
        "deviation |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["traces"]:
        link = f"{row['megabits']} Mbit/s" if row["megabits"] else "unlimited"
        deviation = row["simulated"] / row["seconds"] - 1
        lines.append(
            f"| {row['ranks']} | {link} | {row['rate'] / 1e6:.1f} | {row['load']:.1f} | "
            f"{row['seconds']:.2f} | {row['simulated']:.2f} | {deviation:+.0%} |"
        )
    return lines


def _speed(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def plot(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    bases = result["bases"]
    figure, axes = pyplot.subplots(1, len(bases), figsize=(3.2 * len(bases), 3.2), squeeze=False)
    for axis, base in zip(axes[0], bases, strict=True):
        for network, color in zip(NETWORKS, ("tab:blue", "tab:orange", "tab:red"), strict=True):
            for wire, style in (("int8", "-"), ("16 bits", ":")):
                groups = [row["group"] for row in base["groups"]]
                values = [row["simulated"][network][wire] for row in base["groups"]]
                label = f"{network}, {wire}" if base is bases[0] else None
                axis.plot(groups, values, style, color=color, label=label)
        bad = [row for row in base["groups"] if not row["fits"]]
        if bad:
            axis.axvspan(0.9, max(row["group"] for row in bad) * 1.4, color="0.9")
        axis.set(xscale="log", yscale="log", xlabel="GPUs per copy", title=base["name"])
        axis.set_xlim(0.9, max(GPUS) * 1.1)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("useful tokens/s per GPU, simulated")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
