"""Updates that are skipped because a loss or gradient is not finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from trainer.training.progress import TrainingProgress


class Diverged(RuntimeError):
    """Every prompt had too many non-finite updates in a row."""


def count_skipped(
    progress: TrainingProgress,
    names: Sequence[str],
    skipped: Sequence[bool],
    norms: Sequence[float],
    limit: int,
    warn: Callable[[str], None],
) -> list[int]:
    """Count the updates that were skipped in a step; equal on all ranks, as gradient sums are.

    Args:
        norms: gradient norm of each prompt, [K].

    Returns:
        The prompts that have reached the limit of skipped updates in a row.
    """
    diverged = []
    for k, (name, was_skipped, norm) in enumerate(zip(names, skipped, norms, strict=True)):
        if not was_skipped and math.isfinite(norm):
            progress.skipped_in_a_row[name] = 0
            continue
        in_a_row = progress.skipped_in_a_row.get(name, 0) + 1
        progress.skipped_in_a_row[name] = in_a_row
        progress.skipped[name] = progress.skipped.get(name, 0) + 1
        warn(
            f"step {progress.step}: loss or gradient of prompt {name!r} is not finite; "
            f"its update was left out on all ranks ({in_a_row} in a row)"
        )
        if in_a_row >= limit:
            diverged.append(k)
            warn(f"{_divergence([name], limit)}; it is stopped (other prompts continue)")
    return diverged


def raise_if_all_diverged(progress: TrainingProgress, num_prompts: int, limit: int) -> None:
    """Raise ``Diverged`` if no prompt is left because all of them diverged."""
    diverged = [name for name, end in progress.stopped.items() if end["reason"] == "diverged"]
    if len(diverged) == num_prompts:
        raise Diverged(
            f"{_divergence(diverged, limit)}; no prompt is left, and the last checkpoint is from "
            "before"
        )


def _divergence(names: Sequence[str], limit: int) -> str:
    return (
        f"prompt {', '.join(map(repr, names))}: {limit} updates in a row were not finite "
        f"(training.max_skipped_updates={limit}); lower its learning_rate, or look for damaged "
        "rows or weights"
    )
