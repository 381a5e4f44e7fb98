"""Make the table, the plot and the JSON of ``benchmarks.peers``."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.figures import machine
from benchmarks.peers.arms import AS_PEERS, EPOCH
from trainer.model.layers.float_matmul import prefers_onednn

RESULTS = Path(__file__).resolve().parents[1] / "results"
#: Targets: case -> figure -> value. For speeds it is a minimum, else a maximum.
REACH = {
    "20 virtual tokens": {"speed, grouped": 2.0, "speed, random": 3.5, "flops": 0.8, "saved": 0.7},
    "100 virtual tokens": {
        "speed, grouped": 3.0,
        "speed, random": 5.0,
        "flops": 0.55,
        "saved": 0.5,
    },
    "rows of equal length": {"saved, equal": 1.0},
}
TITLES = {
    "speed, grouped": "useful tokens/s, ours / best peer grouped by length",
    "speed, random": "useful tokens/s, ours / best peer at its default batches",
    "flops": "FLOPs per useful token, ours / best peer grouped by length",
    "saved": "peak saved bytes, ours / best peer grouped by length",
    "saved, equal": "the same, with the peers' number of rows in a micro-batch of ours",
}


def summarise(turns: dict[str, Any]) -> dict[str, Any]:
    """Summarize one arm: median speed over epochs of timed turns, and costs over all ranks."""
    timed = [
        (sum(rank["tokens"] for rank in ranks), max(rank["seconds"] for rank in ranks))
        for ranks in turns["timed"]
    ]
    # Any ``EPOCH`` consecutive steps read all rows.
    epochs = [timed[i : i + EPOCH] for i in range(len(timed) - EPOCH + 1)]
    speeds = [sum(n for n, _ in epoch) / sum(s for _, s in epoch) for epoch in epochs]
    costs = [rank for ranks in turns["costs"] for rank in ranks]
    return {
        "tokens_per_second": median(speeds),
        "every_turn": [round(tokens / seconds, 1) for tokens, seconds in timed],
        "flops_per_token": sum(r["flops"] for r in costs) / sum(r["tokens"] for r in costs),
        "saved_bytes": max(rank["saved"] for rank in costs),
        "shares": turns["shares"][0]["shares"],
    }


def figures(arms: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Return each figure of this trainer relative to the peer that is best at this figure."""
    ours = arms["ours"]
    peers = {name: arm for name, arm in arms.items() if not name.startswith("ours")}
    grouped = [arm for name, arm in peers.items() if "grouped" in name]
    random = [arm for name, arm in peers.items() if "grouped" not in name]

    def best(rounds: list[dict[str, Any]], key: str, choose: Any) -> float:
        return float(choose(arm[key] for arm in rounds))

    ratios = {
        "speed, grouped": ours["tokens_per_second"] / best(grouped, "tokens_per_second", max),
        "flops": ours["flops_per_token"] / best(grouped, "flops_per_token", min),
        "saved": ours["saved_bytes"] / best(grouped, "saved_bytes", min),
    }
    if (equal := arms.get(AS_PEERS)) is not None:
        ratios["saved, equal"] = equal["saved_bytes"] / best(grouped, "saved_bytes", min)
    if random:
        speed = best(random, "tokens_per_second", max)
        ratios["speed, random"] = ours["tokens_per_second"] / speed
    return ratios


def summary(result: dict[str, Any], losses: dict[str, list[float]] | None) -> dict[str, Any]:
    """Return the report as JSON values."""
    cases = {
        name: {arm: summarise(turns) for arm, turns in arms.items()}
        for name, arms in result.items()
    }
    return {
        "machine": machine(),
        "prefers_onednn": prefers_onednn(),
        "cases": {name: {"arms": arms, "figures": figures(arms)} for name, arms in cases.items()},
        "losses": losses,
    }


def write(report: dict[str, Any]) -> dict[str, Any]:
    """Write table, plot and JSON to benchmarks/results/; return the report with earlier cases."""
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / "peers.json"
    if file.exists():
        before = json.loads(file.read_text())
        report = report | {
            "cases": before["cases"] | report["cases"],
            "losses": report["losses"] or before["losses"],
        }
    file.write_text(json.dumps(report, indent=2) + "\n")
    (RESULTS / "peers.md").write_text(table(report))
    plot(report, RESULTS / "peers.png")
    return report


def table(report: dict[str, Any]) -> str:
    lines = [
        "# Beside the trainers that people use now",
        "",
        f"`python -m benchmarks.peers` on {report['machine']}. A Llama of 110M random weights in "
        "fp32 (ours: int8, its default), rows of log-normal length (median 60 tokens, longest 512) "
        "with 6 labels each, the same rows, prompt and optimizer for all, one thread per rank. "
        "Useful tokens are tokens of text, neither padding nor virtual. Arms take turns of one "
        "step; all rows are read in two steps, and speeds are medians over such pairs.",
        "",
        "| figure | case | measured | reach |",
        "|---|---|---|---|",
    ]
    for name, case in report["cases"].items():
        for key, value in case["figures"].items():
            reach = REACH.get(name, {}).get(key)
            sign = ">=" if key.startswith("speed") else "<="
            goal = "" if reach is None else f"{sign} {reach}"
            lines.append(f"| {TITLES[key]} | {name} | {value:.2f} | {goal} |")
    for name, case in report["cases"].items():
        kinds = list(next(iter(case["arms"].values()))["shares"])
        lines += [
            "",
            f"## {name}",
            "",
            *([case["note"], ""] if "note" in case else []),
            "| | useful tokens/s | MFLOPs per useful token | peak saved MB | "
            + " | ".join(kinds)
            + " |",
            "|---" * (4 + len(kinds)) + "|",
        ]
        for arm, one in case["arms"].items():
            shares = " | ".join(f"{100 * one['shares'][kind]:.0f}%" for kind in kinds)
            lines.append(
                f"| {arm} | {one['tokens_per_second']:.0f} | {one['flops_per_token'] / 1e6:.0f} | "
                f"{one['saved_bytes'] / 1e6:.0f} | {shares} |"
            )
    if report["prefers_onednn"]:
        lines += [
            "",
            "The peers multiply in fp32, for which torch uses MKL. On this CPU (AMD), it uses only "
            "AVX2. Ours multiplies in int8, and the head in fp32 with oneDNN.",
        ]
    if report["losses"]:
        ours, theirs = report["losses"].values()
        apart = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
        lines += [
            "",
            f"Losses of the same {len(ours)} steps from the same prompt, in fp32 without int8, "
            f"ours and PEFT's: at most {apart:.1e} apart, while they fall from {ours[0]:.1f} to "
            f"{ours[-1]:.1f}.",
        ]
    lines += [
        "",
        "![useful tokens per second](peers.png)",
        "",
        "FLOPs: two per multiply and add of all matrix products, integer ones included. Saved "
        "bytes: what autograd holds for backward, weights left out; the most of an epoch on the "
        "worst rank. Shares: of the CPU time of rank 0's operators in a profiled step that follows "
        "another of the same arm. Quantization: of the inputs of int8 products, with the scaling "
        "of their results and the activation of an MLP. Loops are the other compiled ones: norms "
        "and rotations.",
        "",
    ]
    return "\n".join(lines)


def plot(report: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = report["cases"]
    size = (3.4 * len(cases), 3.6)
    figure, axes = pyplot.subplots(1, len(cases), figsize=size, squeeze=False)
    for axis, (name, case) in zip(axes[0], cases.items(), strict=True):
        arms = list(case["arms"])
        speeds = [case["arms"][arm]["tokens_per_second"] for arm in arms]
        colours = ["#1f77b4" if arm.startswith("ours") else "#b0b0b0" for arm in arms]
        axis.barh(range(len(arms)), speeds, color=colours)
        for i, arm in enumerate(arms):
            every = case["arms"][arm]["every_turn"]
            axis.plot(every, [i] * len(every), ".", color="black", markersize=3)
        axis.set_yticks(range(len(arms)), arms, fontsize=7)
        axis.invert_yaxis()
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("useful tokens/s", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
