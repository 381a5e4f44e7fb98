"""The cost of a run, as text: time, tokens, traffic and memory. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.reporting.summary import RunSummary
from trainer.runtime.phases import clock


@dataclass(frozen=True)
class Fact:
    """A measured quantity as text, and what the plan of the run expected, if there was one."""

    name: str
    value: str
    planned: str = ""


def cost_facts(summary: RunSummary, useful_tokens: int = 0) -> list[Fact]:
    """Return the known costs of a run.

    Args:
        useful_tokens: of an unfinished run, from its metrics.
    """
    memory, throughput = summary.memory, summary.throughput
    tokens = throughput.useful_tokens or useful_tokens
    waited, speed = throughput.data_wait_share, throughput.useful_tokens_per_second
    plan = summary.planned
    planned = (
        {}
        if plan is None
        else {
            "time": clock(plan.seconds),
            device_hours_name(summary): _hours(plan.seconds, summary),
            "useful tokens/s": f"{plan.useful_tokens_per_second:,.0f}",
            "base per rank": size(plan.base_bytes_per_rank),
            "peak GPU memory": size(plan.peak_bytes),
            "all-gather volume / step": size(plan.gathered_bytes_per_step),
            "base load time": f"{plan.load_seconds:.1f} s",
        }
    )
    facts = [
        ("steps", summary.steps),
        ("time", clock(summary.time["total"]) if "total" in summary.time else None),
        (device_hours_name(summary), device_hours(summary)),
        ("useful tokens", f"{tokens:,}" if tokens else None),
        ("useful tokens/s", f"{speed:,.0f}" if speed else None),
        ("data-loading wait", f"{waited:.1%}" if waited is not None else None),
        ("ranks", summary.world_size),
        ("base per rank", size(memory.base_bytes_per_rank)),
        ("peak memory (RSS)", size(memory.peak_rss_bytes)),
        ("peak GPU memory", size(memory.peak_gpu_bytes)),
        ("all-gather volume / step", size(summary.communication.gathered_bytes_per_step)),
        ("base load time", f"{summary.load.seconds:.1f} s" if summary.load.seconds else None),
    ]
    return [
        Fact(name, str(value), planned.get(name) or "")
        for name, value in facts
        if value is not None
    ]


def cost_sentence(summary: RunSummary) -> str:
    """Describe the cost in one sentence; empty if the time is unknown."""
    hours, memory = device_hours(summary), summary.memory
    if hours is None:
        return ""
    total, ranks = summary.time["total"], summary.world_size or 1
    changed = abs((summary.rank_seconds or total * ranks) - total * ranks) > 1
    on = "in the end on" if changed else "on"
    parts = [f"{hours} {device_hours_name(summary)} ({clock(total)} {on} "]
    parts[0] += f"{summary.world_size} rank{'' if summary.world_size == 1 else 's'})"
    if tokens := summary.throughput.useful_tokens:
        parts.append(f"{tokens:,} useful tokens")
    if gathered := size(summary.communication.gathered_bytes_per_step):
        parts.append(f"{gathered} gathered per step")
    if peak := size(memory.peak_gpu_bytes or memory.peak_rss_bytes):
        parts.append(f"a peak of {peak} of {'GPU ' * bool(memory.peak_gpu_bytes)}memory per rank")
    return f"Cost of the run: {', '.join(parts)}."


def device_hours(summary: RunSummary) -> str | None:
    """Ranks times hours; a rank has one GPU, or on a CPU its share of the cores."""
    if summary.rank_seconds is not None:
        return f"{summary.rank_seconds / 3600:.3g}"
    return _hours(summary.time["total"], summary) if "total" in summary.time else None


def _hours(seconds: float, summary: RunSummary) -> str | None:
    return f"{seconds * summary.world_size / 3600:.3g}" if summary.world_size else None


def device_hours_name(summary: RunSummary) -> str:
    return "GPU-hours" if summary.memory.peak_gpu_bytes else "rank-hours (CPU)"


def size(count: float | None) -> str | None:
    """Format a number of bytes with three digits: ``3.41 MB``."""
    if count is None:
        return None
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
