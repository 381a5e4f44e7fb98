"""One row with its prompt, before rows are laid out in packed batches. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from trainer.data.teacher import Teacher
from trainer.data.token_table import Example
from trainer.packing.token_tree import TokenTree, tree_of, tree_of_candidates

#: In place of the index of a prompt: the base without a prompt.
NO_PROMPT = -1
#: Index of a prompt in the bank or ``NO_PROMPT``, number of tokens before its virtual tokens,
#: tokens around them.
SegmentKey = tuple[int, int, tuple[int, ...]]


@dataclass(frozen=True)
class PackedRow:
    """One row of a task together with the prompt before it.

    Attributes:
        prompt: index in the bank, or None for the base without a prompt.
        slot: a number chosen by the caller; losses are returned by slot.
        is_padding: the row only gives a rank without rows the same number of forwards as other
            ranks; its labels do not count.
        teacher: the label positions learn its distributions instead of the labels.
        candidates: the row with each of its candidate targets, ``example`` first; candidate i has
            the slot ``slot + i``. Empty: ``example`` is the only target.
        shared: number of leading tokens that all rows of the caller have in common. They are read
            once per packed batch, as those of ``Example.prompt_end`` are.
        share: part of the row that this is; below 1 if its candidates are in several packed rows.
    """

    example: Example
    prompt: int | None
    slot: int
    is_padding: bool = False
    teacher: Teacher | None = None
    candidates: tuple[Example, ...] = ()
    shared: int = 0
    share: float = 1.0

    @cached_property
    def tree(self) -> TokenTree:
        """Tokens of the row after those in the prompt's segment."""
        if self.candidates:
            return tree_of_candidates(self.candidates, self.num_leading)
        return tree_of(self.example, self.num_leading)

    @property
    def num_leading(self) -> int:
        """Number of leading tokens of the example that are in the prompt's segment."""
        return max(self.shared, 0 if self.prompt is None else self.example.prompt_end)

    @property
    def num_tokens(self) -> int:
        """Number of tokens in a packed batch, without the prompt's segment."""
        if self.candidates:
            return len(self.tree.token_ids)
        return self.example.num_tokens - self.num_leading

    @cached_property
    def segment_key(self) -> SegmentKey | None:
        """Key of the segment before the row, which rows with equal keys share; None without one."""
        ids = self.example.input_ids[: self.num_leading]
        if self.prompt is None:
            return (NO_PROMPT, 0, ids) if ids else None
        return self.prompt, self.example.prompt_at, ids


@dataclass(frozen=True)
class PromptLengths:
    """Number of virtual tokens of every prompt in the bank, [K].

    Attributes:
        tokens: of prompts with positions in a packed batch; 0 for prompts of keys and values.
        past: of prompts of keys and values; 0 for others.
    """

    tokens: tuple[int, ...]
    past: tuple[int, ...]


def teacher_rows(rows: Sequence[PackedRow]) -> tuple[list[PackedRow], list[int]]:
    """Return the rows that a teacher reads, and the lengths of the teachers' texts.

    Without rows of a teacher, return one padding row. The prompts of these rows are numbered by
    ``Teacher.index``.
    """
    lengths: dict[int, int] = {}
    distilled = []
    for row in rows:
        if row.teacher is not None:
            teacher = row.teacher
            lengths[teacher.index] = len(teacher.token_ids)
            distilled.append(PackedRow(teacher.continued_by(row.example), teacher.index, row.slot))
    shortest = min(rows, key=lambda row: row.example.num_tokens)
    padding_row = PackedRow(shortest.example, None, shortest.slot, is_padding=True)
    up_to = range(max(lengths, default=-1) + 1)
    return distilled or [padding_row], [lengths.get(index, 0) for index in up_to]


def segment_length(key: SegmentKey, prompt_lengths: Sequence[int]) -> int:
    """Return the number of tokens of a prompt's segment in a packed batch."""
    prompt, _, ids = key
    return len(ids) + (0 if prompt == NO_PROMPT else prompt_lengths[prompt])
