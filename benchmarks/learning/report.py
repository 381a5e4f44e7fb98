"""Make the table, the plot and the JSON of ``benchmarks.learning``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from trainer.prompts.init_search import CHILDREN, DRAWINGS, ROUNDS

RESULTS = Path(__file__).resolve().parents[1] / "results"
#: Part of the names of PEFT arms that start from an instruction; suffixes of this trainer's arms.
WITH_TEXT = "text"
SIDES = {"ours": "", "ours, with instruction": ", instruction known"}
LORA = "LoRA"
METRICS = ("accuracy", "execution")
#: Target besides a better score: upper limit of spread and of steps, relative to PEFT's.
REACH = 0.5


def metric(scores: dict[str, float]) -> float:
    """Return the task's metric from the scores of one evaluation."""
    return next(scores[name] for name in METRICS if name in scores)


def at(trainings: Sequence[dict[str, Any]], step: int) -> list[float]:
    """Return the metric of each seed at a step."""
    return [metric(training["scores"][str(step)]) for training in trainings]


def best_rate(done: Sequence[dict[str, Any]], arm: str, task: str) -> float:
    """Return the rate with the best median score at the last step; ties: the lowest loss."""
    rates: dict[float, list[dict[str, float]]] = {}
    for training in done:
        if (training["arm"], training["task"]) == (arm, task):
            scores = training["scores"]
            rates.setdefault(training["rate"], []).append(scores[max(scores, key=int)])

    def order(rate: float) -> tuple[float, float]:
        trials = rates[rate]
        return median(map(metric, trials)), -median(scores["loss"] for scores in trials)

    return max(rates, key=order)


def summary(report: dict[str, Any]) -> dict[str, Any]:
    """Add ``arms`` of each task, and ``figures`` that compare this trainer's arms with PEFT's."""
    arms: dict[str, dict[str, Any]] = {}
    for task in report["budget"]["tasks"]:
        arms[task] = dict(_arms(report, task))
    figures = {task: _figures(by_arm) for task, by_arm in arms.items()}
    return report | {"arms": arms, "figures": figures}


def _arms(report: dict[str, Any], task: str) -> Any:
    for side, suffix in SIDES.items():
        by_name: dict[str, list[dict[str, Any]]] = {}
        for training in report.get(side) or []:
            if training["task"] == task:
                by_name.setdefault(training["arm"] + suffix, []).append(training)
        for name, trainings in by_name.items():
            yield name, _curve(trainings)
    peers = [training for training in report.get("peers") or [] if training["task"] == task]
    for arm in dict.fromkeys(training["arm"] for training in peers):
        best = best_rate(peers, arm, task)
        own = [t for t in peers if t["arm"] == arm]
        curve = _curve([t for t in own if t["rate"] == best])
        rates = sorted({t["rate"] for t in own})
        yield f"PEFT, {arm}", curve | {"rate": best, "rates": rates}


def _curve(trainings: Sequence[dict[str, Any]]) -> dict[str, Any]:
    steps = sorted(map(int, trainings[0]["scores"]))
    every = {step: at(trainings, step) for step in steps}
    last = str(steps[-1])
    return {
        "seeds": len(trainings),
        "median": {step: median(values) for step, values in every.items()},
        "lowest": {step: min(values) for step, values in every.items()},
        "highest": {step: max(values) for step, values in every.items()},
        "loss": median(training["scores"][last]["loss"] for training in trainings),
        "last": steps[-1],
    }


def reaches(arm: dict[str, Any], score: float) -> int | None:
    """Return the first evaluated step at which an arm's median reaches a score, or None."""
    return next((step for step, value in arm["median"].items() if value >= score), None)


def spread(arm: dict[str, Any], step: int) -> float:
    """Return the difference between the highest and the lowest seed."""
    return float(arm["highest"][step] - arm["lowest"][step])


def _figures(arms: dict[str, Any]) -> list[dict[str, Any]]:
    """Compare each of this trainer's arms with PEFT's best arm of the same kind."""
    rows = []
    for name, arm in arms.items():
        if not name.startswith("ours"):
            continue
        with_text = name.endswith(SIDES["ours, with instruction"])
        peers = {
            peer: other
            for peer, other in arms.items()
            if peer.startswith("PEFT") and LORA not in peer and (with_text or WITH_TEXT not in peer)
        }
        if not peers:
            continue
        last = arm["last"]
        best = max(peers, key=lambda peer: (peers[peer]["median"][last], -peers[peer]["loss"]))
        other = peers[best]
        rows.append(
            {
                "ours": name,
                "peer": best,
                "scores": [arm["median"][last], other["median"][last]],
                "spreads": [spread(arm, last), spread(other, last)],
                "half_scores": [_half(arm), _half(other)],
                "steps": [
                    reaches(arm, other["median"][last]),
                    reaches(other, other["median"][last]),
                ],
            }
        )
    return rows


def _half(arm: dict[str, Any]) -> float:
    """Return the median at the first evaluation, after the fewest rows."""
    return float(next(iter(arm["median"].values())))


def verdict(ours: float, peer: float) -> str:
    return "tie" if ours == peer else "better" if ours > peer else "worse"


def ratio_held(ours: float | None, peer: float | None) -> bool:
    """Whether ours is at most ``REACH`` times the peer's; False if one is None."""
    return ours is not None and peer is not None and ours <= REACH * peer


def reached(row: dict[str, Any]) -> str:
    """List which of the three targets a row reaches."""
    held = {
        "score": row["scores"][0] > row["scores"][1],
        "spread": ratio_held(*row["spreads"]),
        "steps": ratio_held(*row["steps"]),
    }
    return ", ".join(what for what, done in held.items() if done) or "none"


def table(report: dict[str, Any], picture: str) -> str:
    """Render the comparison, every arm of every task, and a link to the plot as Markdown."""
    budget = report["budget"]
    tried = DRAWINGS + ROUNDS * CHILDREN
    lines = [
        "# How far prompts come with few rows",
        "",
        "`python -m benchmarks.learning`: the example tasks over the tiny base in fp32, "
        f"{budget['steps']} steps of at most {budget['tokens_per_step']} tokens of text (about 11 "
        "rows of triage and animals), 20 virtual tokens, the same rows in the same order for all. "
        "Ours has its defaults: the run file names task and method. PEFT's arms (AdamW, clipped, "
        "linear decay, as transformers' Trainer) are each at the best of five learning rates, "
        f"chosen by these very scores. Scores are those of {budget['validation_rows']} validation "
        "rows, drawn for this as the example files were; medians over seeds.",
        "",
        "An arm *with the instruction known* finds the hand-written instructions of the example "
        "run file in its task; PEFT's *text* starts from the first of them. It is compared with "
        "the best of all PEFT's prompts, the others with the best that needs no instruction. What "
        "is to be reached: a better median score after the last step, at most half the spread from "
        "the lowest seed to the highest, at most half the steps to PEFT's own last score.",
        "",
    ]
    lines += _comparison(report)
    for task, arms in report["arms"].items():
        lines += ["", f"## {task}", "", *_task(arms)]
    lines += [
        "",
        "`search.init_share: 10` lets `init: search` run to its end; by default its cost is at "
        f"most a tenth of the training, and {budget['steps']} steps would allow no search. It "
        "reads the rows of the first update once behind each of its "
        f"{tried} starts (one more where a task has labels, four with instructions): only "
        f"forwards, the FLOPs of {tried // 2} updates. These are rows that the first update trains "
        "on anyhow, so that the rows seen stay equal, but the work does not: with it one of our "
        f"trainings is as long as {tried // 2 + budget['steps']} updates; PEFT's at five rates are "
        f"{5 * budget['steps']} together.",
        "",
        f"![median scores by step]({picture})",
        "",
    ]
    return "\n".join(lines)


def _comparison(report: dict[str, Any]) -> list[str]:
    lines = [
        "| task | ours, beside PEFT's best prompt | score | with the fewest rows | lowest to "
        "highest seed | steps to PEFT's last score | reached |",
        "|---|---|---|---|---|---|---|",
    ]
    for task, figures in report["figures"].items():
        for row in figures:
            (a, b), (first, other), (s, t) = row["scores"], row["half_scores"], row["spreads"]
            ours, theirs = ("never" if x is None else str(x) for x in row["steps"])
            lines.append(
                f"| {task} | {row['ours']}, beside {row['peer']} | {a:.3f}, {b:.3f}: "
                f"{verdict(a, b)} | {first:.3f}, {other:.3f}: {verdict(first, other)} | "
                f"{s:.3f}, {t:.3f} | {ours}, {theirs} | {reached(row)} |"
            )
    return lines


def _task(arms: dict[str, Any]) -> list[str]:
    steps = list(next(iter(arms.values()))["median"])
    head = [f"step {step}" for step in steps]
    lines = [
        "| | rate | " + " | ".join(head) + " | lowest to highest at the end | loss |",
        "|---" * (len(head) + 4) + "|",
    ]
    for name, arm in arms.items():
        rate = "default"
        if "rate" in arm:
            rate = f"{arm['rate']:g} of {', '.join(f'{r:g}' for r in arm['rates'])}"
        values = " | ".join(f"{arm['median'][step]:.3f}" for step in steps)
        last = arm["last"]
        lines.append(
            f"| {name} | {rate} | {values} | {arm['lowest'][last]:.3f} to "
            f"{arm['highest'][last]:.3f} | {arm['loss']:.4f} |"
        )
    return lines


def plot(report: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    arms = report["arms"]
    figure, axes = pyplot.subplots(1, len(arms), figsize=(4.6 * len(arms), 3.6), squeeze=False)
    for axis, (task, by_arm) in zip(axes[0], arms.items(), strict=True):
        for name, arm in by_arm.items():
            style = "-" if name.startswith("ours") else "--"
            steps = list(arm["median"])
            (line,) = axis.plot(steps, list(arm["median"].values()), style, label=name)
            low, high = list(arm["lowest"].values()), list(arm["highest"].values())
            axis.fill_between(steps, low, high, color=line.get_color(), alpha=0.07)
        axis.set_title(task, fontsize=9)
        axis.set_xlabel("steps", fontsize=8)
    axes[0][0].set_ylabel("validation score", fontsize=8)
    axes[0][-1].legend(fontsize=5)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
