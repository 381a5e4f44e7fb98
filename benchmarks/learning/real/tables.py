"""Make table, plot and JSON of the results, with a list of what was not run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.learning.real.arm_results import ArmResult, arm_results
from benchmarks.learning.real.cells import Cell
from benchmarks.learning.real.files import HELD_BACK
from benchmarks.learning.real.laboratory import NUM_SHOTS, NUM_VIRTUAL_TOKENS, Laboratory
from benchmarks.learning.real.own_runs import BASES, OURS, validated_steps
from benchmarks.learning.real.packed_peft import PEERS
from benchmarks.learning.real.plan import (
    BASELINES,
    DECISIVE_OURS,
    DECISIVE_PEERS,
    HAND_WRITTEN,
    MAJORITY,
    NO_PROMPT,
    SHOTS,
    STEP_PROFILE,
    Design,
)
from trainer.evaluation.statistics import Difference, paired_rates

#: The arm whose paired differences to all others the table shows.
REFERENCE = DECISIVE_OURS[0]
#: Seconds by phase of ``promptshard train``, and the words of the table.
PHASES = {
    "training": "training",
    "initialization search": "search",
    "baselines": "baselines",
    "validation": "validation",
}


def tables(laboratory: Laboratory, design: Design, picture: str) -> str:
    """Render the results as Markdown."""
    lines = _head(laboratory, design)
    comparisons, bodies = list[str](), list[str]()
    seeds = set[int]()
    for task in design.tasks:
        arms = arm_results(laboratory, design, task, design.rows[0])
        if arms:
            seeds |= {seed for arm in arms.values() for seed in arm.seeds}
            comparisons += _verdicts(task, arms)
            bodies += ["", f"## {task}", "", *_task_table(arms)]
    if seeds == {design.seeds[0]}:
        comparisons += ["", "Only one seed was run; others can change these differences."]
    lines += ["", "## Wins, losses and ties", "", *comparisons, *bodies]
    lines += ["", "## Fewer and more training rows", "", *_curves(laboratory, design)]
    lines += ["", "## Shorter and longer training", "", *_lengths(laboratory, design)]
    lines += ["", "## Cost", "", *_costs(laboratory, design)]
    lines += ["", "## How the base is stored", "", *_bases(laboratory, design)]
    lines += ["", "## What was run and what was not", "", *_coverage(laboratory, design)]
    return "\n".join([*lines, "", f"![accuracy of the arms]({picture})", ""])


def _head(laboratory: Laboratory, design: Design) -> list[str]:
    reads = (
        f"- **{task}**: {_train_rows(laboratory, design, task)} training rows, "
        f"{design.reviews[task].validation_rows} validation rows, "
        + (
            f"reviews cut after {design.reviews[task].words} words."
            if design.reviews[task].words
            else "whole reviews."
        )
        for task in design.tasks
    )
    return [
        "# Learning on a real language model",
        "",
        "`python -m benchmarks.learning --base smollm2`: SmolLM2-135M-Instruct, two questions "
        "about patients' reviews of drugs, written by the model's chat template:",
        "",
        *reads,
        "",
        f"All arms train on the same rows for {design.steps} steps of at most "
        f"{design.tokens_per_step} tokens of text. They are scored on the same validation rows by "
        f"the likelihood of the choices. Virtual tokens: {NUM_VIRTUAL_TOKENS}. Intervals are 95%, "
        "over the validation rows; differences are paired by row.",
        "",
        "- **Ours**: the run file sets task, method and position; everything else is default. The "
        "base is stored in int8, the default.",
        "- **PEFT**: its modules on the base in 16 bits, computed in fp32 (faster on a CPU without "
        "bfloat16 products). AdamW, clipped, linear decay. The rows of an update are packed into "
        "one batch, as in ours. The learning rate is the one with the lowest loss on "
        f"{HELD_BACK} training rows that no arm trains on, of those in the table.",
        f"- **Best step**: ours and PEFT are scored on these {HELD_BACK} held-out rows whenever "
        f"`promptshard train` validates by default (with {design.steps} steps: after step "
        f"{', '.join(map(str, validated_steps(design.steps)))}), and the best step counts.",
        f"- **Best instruction**: of five, the one with the highest accuracy on the {HELD_BACK} "
        "held-out rows. It is `hand_written` in our run file, and the initial text "
        "of *PEFT prompt tuning, text*.",
        f"- **{SHOTS}**: {NUM_SHOTS} fixed training rows with their answers before each row, as "
        "many of each answer as possible.",
        "- With `position: system`, the template's words before the review are a part of the "
        "prompt, so an update has more rows within the same number of text tokens.",
    ]


def _train_rows(laboratory: Laboratory, design: Design, task: str) -> int:
    return min(design.rows[0], laboratory.files.num_train(task))


def _verdicts(task: str, arms: dict[str, ArmResult]) -> Iterator[str]:
    """Compare each of this trainer's arms with each other arm, in a line."""
    others = [arm for arm in arms.values() if arm.arm not in OURS]
    for name in OURS:
        if name not in arms or name in BASES:
            continue
        by_outcome = {
            "better": list[str](),
            "worse": list[str](),
            "no significant difference": list[str](),
        }
        for other in others:
            difference = arms[name].minus(other)
            word = "no significant difference"
            if difference.significant:
                word = "better" if difference.difference > 0 else "worse"
            by_outcome[word].append(f"{other.arm} ({_points(difference)})")
        texts = (f"**{word}**: {', '.join(names)}" for word, names in by_outcome.items() if names)
        yield f"- {task}, {name}: {'; '.join(texts)}."


def _points(difference: Difference) -> str:
    low, high = 100 * difference.low, 100 * difference.high
    return f"{100 * difference.difference:+.1f}, {low:+.1f} to {high:+.1f}"


def _task_table(arms: dict[str, ArmResult]) -> Iterator[str]:
    yield (
        f"| | accuracy | loss | difference: {REFERENCE} minus this | learning rate, "
        "of those tried | seeds | best to worst seed | trained parameters |"
    )
    yield "|---" * 8 + "|"
    reference = arms.get(REFERENCE)
    for name, arm in arms.items():
        if name in BASES:
            continue
        low, high = arm.interval
        loss = "" if arm.loss is None else f"{arm.loss:.3f}"
        difference = ""
        if reference is not None and name != REFERENCE:
            difference = _points(reference.minus(arm))
        rate = "" if name in BASELINES else "default"
        if arm.rate is not None:
            rate = f"{arm.rate:g} of {', '.join(f'{r:g}' for r in arm.tried)}"
        parameters = arm.mean("trained_parameters")
        label = name
        if name == MAJORITY:
            label = f"{name}: {arm.results[0]['answer']}"
        accuracy = f"{100 * arm.accuracy:.1f}% ({100 * low:.1f} to {100 * high:.1f})"
        yield (
            f"| {label} | {accuracy} | {loss} | {difference} | {rate} | "
            f"{'' if name in BASELINES else ', '.join(map(str, arm.seeds))} | "
            f"{100 * arm.spread:.1f} | {parameters or 0:,.0f} |"
        )


def _flops(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}".replace("e+", "e")


def _curves(laboratory: Laboratory, design: Design) -> Iterator[str]:
    """Trained arms with another number of training rows, and as many steps."""
    lines = []
    for task in design.tasks:
        by_rows = {n: arm_results(laboratory, design, task, n) for n in sorted(design.rows)}
        instruction = by_rows[design.rows[0]].get(HAND_WRITTEN)
        for name in (*OURS, *PEERS):
            done = {n: arms[name] for n, arms in by_rows.items() if name in arms}
            if len(done) > 1:
                all_rows = _train_rows(laboratory, design, task)
                lines += [
                    _curve(
                        task, min(n, all_rows), arm, by_rows[n].get(DECISIVE_PEERS[0]), instruction
                    )
                    for n, arm in done.items()
                ]
    if not lines:
        yield "Not run yet."
        return
    yield (
        "| task, arm | training rows | accuracy | minus LoRA | minus the best instruction | loss | "
        "seeds |"
    )
    yield "|---" * 7 + "|"
    yield from lines


def _curve(
    task: str, rows: int, arm: ArmResult, lora: ArmResult | None, instruction: ArmResult | None
) -> str:
    minus = (
        "" if other is None or other is arm else _points(arm.minus(other))
        for other in (lora, instruction)
    )
    seeds = ", ".join(map(str, arm.seeds))
    return (
        f"| {task}, {arm.arm} | {rows} | {100 * arm.accuracy:.1f}% | {' | '.join(minus)} | "
        f"{arm.loss:.3f} | {seeds} |"
    )


def _lengths(laboratory: Laboratory, design: Design) -> Iterator[str]:
    """Trained arms with the same rows and another number of steps of the same size."""
    cells = [Cell(**record["cell"]) for record in laboratory.cells]
    steps = {c.steps for c in cells if c.tokens_per_step == design.tokens_per_step}
    lines = []
    for task in design.tasks:
        by_steps = {
            n: arm_results(laboratory, replace(design, steps=n), task, design.rows[0])
            for n in sorted(steps)
        }
        for name in (*OURS, *PEERS):
            done = {n: arms[name] for n, arms in by_steps.items() if name in arms}
            if len(done) > 1:
                lines += [
                    _length(task, n, arm, by_steps[n].get(MAJORITY)) for n, arm in done.items()
                ]
    if not lines:
        yield "Not run yet."
        return
    yield (
        "| task, arm | steps | best step | accuracy | minus the majority answer | loss | "
        "learning rate | seeds |"
    )
    yield "|---" * 8 + "|"
    yield from lines


def _length(task: str, steps: int, arm: ArmResult, majority: ArmResult | None) -> str:
    best = ", ".join(str(result.get("step", steps)) for result in arm.results)
    points = "" if majority is None else _points(arm.minus(majority))
    rate = "default" if arm.rate is None else f"{arm.rate:g}"
    seeds = ", ".join(map(str, arm.seeds))
    return (
        f"| {task}, {arm.arm} | {steps} | {best} | {100 * arm.accuracy:.1f}% | {points} | "
        f"{arm.loss:.3f} | {rate} | {seeds} |"
    )


def _costs(laboratory: Laboratory, design: Design) -> Iterator[str]:
    profile = laboratory.result(_profile_cell(design))
    yield (
        "Seconds on one thread of machines that other programs used, not the same machine for all "
        "cells: they compare arms only roughly. FLOPs of training are counted by operator in one "
        "step and scaled to all tokens."
    )
    yield ""
    yield (
        "| task, arm | text tokens per second | seconds of training | training FLOPs | phases of "
        "the run |"
    )
    yield "|---|---|---|---|---|"
    for task in design.tasks:
        for name, arm in arm_results(laboratory, design, task, design.rows[0]).items():
            seconds, tokens = arm.mean("train_seconds"), arm.mean("text_tokens")
            if name in BASES or seconds is None or tokens is None:
                continue
            flops, time = arm.mean("train_flops"), arm.results[0].get("time", {})
            if flops is None and profile is not None:
                flops = tokens * profile["train_flops"]
            parts = (
                f"{word} {time[key] / sum(time.values()):.0%}"
                for key, word in PHASES.items()
                if key in time
            )
            yield (
                f"| {task}, {name} | {tokens / seconds:.0f} | {seconds:.0f} | {_flops(flops)} | "
                f"{', '.join(parts)} |"
            )
    if profile is not None:
        yield ""
        for what, key in (("Training", "train_shares"), ("Scoring", "score_shares")):
            shares = ", ".join(f"{kind} {share:.0%}" for kind, share in profile[key].items())
            yield f"- {what}, shares of the time of one step of ours: {shares}."


def _profile_cell(design: Design) -> Cell:
    return design.cell(STEP_PROFILE, design.tasks[0], design.rows[0], 0)


def _bases(laboratory: Laboratory, design: Design) -> Iterator[str]:
    """Compare int8 with 16 bits: texts scored on both bases, and prompts trained on each."""
    yield "Differences in points of accuracy: int8, the default, minus the other base."
    yield ""
    yield "| task | prompt | base | accuracy | loss | difference |"
    yield "|---|---|---|---|---|---|"
    for task in design.tasks:
        arms = arm_results(laboratory, design, task, design.rows[0])
        yield from _texts_on_bases(task, arms)
        trained = [name for name in (REFERENCE, *BASES) if name in arms]
        for name in trained if len(trained) > 1 else ():
            arm = arms[name]
            label = "int8" if name == REFERENCE else name.removeprefix("base in ")
            points = "" if name == REFERENCE else _points(arms[REFERENCE].minus(arm))
            yield _base_row(task, "trained on this base", label, arm.accuracy, arm.loss, points)


def _texts_on_bases(task: str, arms: dict[str, ArmResult]) -> Iterator[str]:
    """Scores of no prompt and of the best instruction on both bases."""
    in_int8 = arms[REFERENCE].results[0].get("baselines", {}) if REFERENCE in arms else {}
    for key, arm in (("no_prompt", NO_PROMPT), ("hand_written-1", HAND_WRITTEN)):
        if key in in_int8 and arm in arms:
            ours, other = in_int8[key], arms[arm]
            correct = [bool(x) for x in other.results[0]["validation"]["correct"]]
            points = _points(paired_rates([bool(x) for x in ours["correct"]], correct))
            yield _base_row(task, arm, "int8", ours["accuracy"], ours["loss"], "")
            yield _base_row(task, arm, "16 bits", other.accuracy, other.loss, points)


def _base_row(
    task: str, prompt: str, base: str, accuracy: float, loss: float | None, points: str
) -> str:
    return f"| {task} | {prompt} | {base} | {100 * accuracy:.1f}% | {loss or 0:.3f} | {points} |"


def _coverage(laboratory: Laboratory, design: Design) -> Iterator[str]:
    """List the cells of the whole design that have a result, and that have none."""
    seeds, rows = len(design.seeds), ", ".join(map(str, design.rows))
    yield (
        f"The whole design: {seeds} seeds, five learning rates, {rows} training rows. "
        "The same command continues with the cells that are missing."
    )
    yield ""
    yield from _commits(laboratory, design)
    yield f"| task, arm | rates tried, of 5 | seeds, of {seeds} | number of training rows |"
    yield "|---|---|---|---|"
    for task in design.tasks:
        by_rows = {n: arm_results(laboratory, design, task, n) for n in sorted(design.rows)}
        main = by_rows[design.rows[0]]
        for arm in (*BASELINES, *OURS, *PEERS):
            result = main.get(arm)
            done = [str(n) for n in by_rows if arm in by_rows[n]]
            rates = str(len(result.tried)) if result and arm in PEERS else ""
            if result is None:
                yield f"| {task}, {arm} | {'0' if arm in PEERS else ''} | not run | not run |"
            else:
                count = "" if arm in BASELINES else str(len(result.seeds))
                yield f"| {task}, {arm} | {rates} | {count} | {', '.join(done)} |"


def _commits(laboratory: Laboratory, design: Design) -> Iterator[str]:
    commits = {
        result["trainer_commit"]
        for task in design.tasks
        for name, arm in arm_results(laboratory, design, task, design.rows[0]).items()
        for result in arm.results
        if name in OURS and result.get("trainer_commit")
    }
    if commits:
        yield f"Last commit of the trainer's code that was measured: {', '.join(sorted(commits))}."
        yield ""


def plot(laboratory: Laboratory, design: Design, path: Path) -> None:
    """Draw the accuracy of every arm with its interval, one panel per task."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    by_task = {t: arm_results(laboratory, design, t, design.rows[0]) for t in design.tasks}
    by_task = {task: arms for task, arms in by_task.items() if arms}
    figure, axes = pyplot.subplots(1, len(by_task), figsize=(6.2 * len(by_task), 4), squeeze=False)
    for axis, (task, arms) in zip(axes[0], by_task.items(), strict=True):
        shown = [arm for name, arm in reversed(arms.items()) if name not in BASES]
        for y, arm in enumerate(shown):
            low, high = arm.interval
            ours, baseline = arm.arm in OURS, arm.arm in BASELINES
            color = "tab:blue" if ours else "tab:gray" if baseline else "tab:orange"
            axis.plot([100 * low, 100 * high], [y, y], color=color, linewidth=2)
            axis.plot([100 * arm.accuracy], [y], "o", color=color)
        axis.set_yticks(range(len(shown)), [arm.arm for arm in shown], fontsize=7)
        axis.set_xlabel("accuracy on the validation rows, %, with 95% interval", fontsize=8)
        axis.set_title(task, fontsize=9)
        axis.grid(axis="x", alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def scores(laboratory: Laboratory, design: Design) -> dict[str, Any]:
    """Return the scores of the table, for all numbers of training rows."""
    by_arm = {}
    for task in design.tasks:
        for rows in design.rows:
            for name, arm in arm_results(laboratory, design, task, rows).items():
                by_arm[f"{task}, {rows} rows, {name}"] = {
                    "accuracy": round(arm.accuracy, 4),
                    "interval": [round(x, 4) for x in arm.interval],
                    "loss": None if arm.loss is None else round(arm.loss, 4),
                    "seeds": list(arm.seeds),
                    "rate": arm.rate,
                    "rates_tried": list(arm.tried),
                }
    return by_arm
