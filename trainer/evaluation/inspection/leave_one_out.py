"""Effect of leaving virtual tokens out of a prompt, and which can be dropped.

Importance of virtual tokens by removal: XPrompt (Ma et al. 2022, arXiv 2210.04457).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from trainer.evaluation.statistics import Difference, paired_ratios
from trainer.prompts.soft_prompt import SoftPrompt


def without(prompt: SoftPrompt, dropped: Collection[int]) -> SoftPrompt | None:
    """Return the prompt without some of its virtual tokens; None if none is left."""
    kept = [i for i in range(prompt.num_virtual_tokens) if i not in dropped]
    return replace(prompt, tensor=prompt.tensor[kept]) if kept else None


def loss_change(
    changed_R: Sequence[float], full_R: Sequence[float], counts_R: Sequence[int]
) -> Difference:
    """Compare the losses of a changed and of a full prompt, paired by row.

    Args:
        changed_R, full_R: negative log-likelihood of every row's target.
        counts_R: number of its tokens.
    """
    return paired_ratios((changed_R, counts_R), (full_R, counts_R))


def does_not_hurt(change: Difference) -> bool:
    """Whether rows do not show that a removal increases the loss: its 95% interval reaches 0."""
    return change.low <= 0


def nested_removals(changes: Sequence[Difference]) -> list[list[int]]:
    """Return the sets of virtual tokens to try to drop together, each with one token more.

    Only tokens whose own removal does not hurt, those that help the least first. One is kept.

    Args:
        changes: of every virtual token.
    """
    order = sorted(range(len(changes)), key=lambda i: changes[i].difference)
    harmless = [i for i in order if does_not_hurt(changes[i])][: len(changes) - 1]
    return [harmless[: n + 1] for n in range(len(harmless))]


@dataclass(frozen=True)
class Removal:
    """Virtual tokens to drop together, in order, and the change of the loss without them."""

    dropped: list[int]
    change: Difference | None


def largest_harmless(removals: Sequence[Sequence[int]], changes: Sequence[Difference]) -> Removal:
    """Return the largest of nested sets that does not hurt, nor does any smaller one."""
    chosen = Removal([], None)
    for dropped, change in zip(removals, changes, strict=True):
        if not does_not_hurt(change):
            break
        chosen = Removal(sorted(dropped), change)
    return chosen
