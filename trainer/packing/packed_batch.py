"""Packed batches: ``[prompt segments | row segments]``, no padding.

A prompt is in a packed batch once, not once per row: in a causal model its states do not depend on
the text behind it. Every row attends to its own prompt and to itself, and its positions continue
those of the prompt. A prompt of keys and values per layer (prefix tuning) has no tokens in the
packed batch: its segment follows the last token, where attention finds its keys.

A row that is scored with several candidate targets is read once for all of them: one segment of the
tokens that all candidates share, and one short segment per candidate that attends to itself, to the
shared segment and to the prompt. The last token of a candidate predicts nothing and is left out.

Shape letters: T tokens of a packed batch, N labels, U positions that predict them, K prompts of the
bank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cached_property
from itertools import takewhile
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from trainer.data.teacher import Teacher
from trainer.data.token_table import Example

T = TypeVar("T")


@dataclass(frozen=True)
class PackedRow:
    """One row as one prompt reads it.

    Attributes:
        prompt: index in the bank, or None for the base without a prompt.
        slot: the caller's own number for this row; losses come back by it.
        is_padding: keeps ranks in lockstep where there is no row left; its labels count nothing.
        teacher: whose distributions the labels' positions learn, instead of the labels.
        candidates: the row with each of its candidate targets, ``example`` first, to be scored in
            one read of the row; candidate i has the slot ``slot + i``. Empty: ``example`` alone.
    """

    example: Example
    prompt: int | None
    slot: int
    is_padding: bool = False
    teacher: Teacher | None = None
    candidates: tuple[Example, ...] = ()

    @cached_property
    def shared_ids(self) -> tuple[int, ...]:
        """Tokens with which all candidates begin."""
        read = [_read_ids(example) for example in self.candidates]
        same = (len(set(column)) == 1 for column in zip(*read, strict=False))
        return read[0][: sum(takewhile(bool, same))]

    @cached_property
    def own_ids(self) -> tuple[tuple[int, ...], ...]:
        """Tokens of each candidate behind the shared ones, without its last label."""
        return tuple(_read_ids(c)[len(self.shared_ids) :] for c in self.candidates)

    @property
    def num_tokens(self) -> int:
        """Tokens that the packed row takes in a packed batch, without its prompt."""
        if not self.candidates:
            return self.example.num_tokens
        return len(self.shared_ids) + sum(map(len, self.own_ids))


def _read_ids(example: Example) -> tuple[int, ...]:
    """Tokens up to the one that predicts the last label."""
    return example.input_ids[: example.label_spans[-1][1] - 1]


@dataclass(frozen=True)
class Segment:
    """A run of tokens that attends causally to itself, and to all tokens of its prefixes.

    Attributes:
        prefix: the segment right in front of this one, behind prefixes of its own.
        candidate: one of several targets of a row; they are consecutive and have one prefix.
    """

    start: int
    length: int
    prefix: Segment | None = None
    candidate: bool = False

    @property
    def prefixes(self) -> tuple[Segment, ...]:
        """All segments in front of this one, the first one first."""
        return () if self.prefix is None else (*self.prefix.prefixes, self.prefix)

    @property
    def prefix_length(self) -> int:
        """Tokens of all prefixes: the position of the segment's first token."""
        return 0 if self.prefix is None else self.prefix.prefix_length + self.prefix.length


@dataclass(frozen=True)
class SharedPositions:
    """Positions that predict labels, each listed once, so that the head reads each once.

    Attributes:
        position_U: distinct positions in the packed batch.
        place_N: index among them of each label's position.
    """

    position_U: Tensor
    place_N: Tensor


@dataclass(frozen=True)
class PackedBatch:
    """What the base reads in one forward.

    Attributes:
        token_ids_T: word ids; 0 where virtual tokens stand.
        position_ids_T: positions, restarting for every segment behind its prompt.
        prompts: (index in the bank, segment) of every prompt in the packed batch.
        past: (index in the bank, segment) of every prompt of keys and values; its segment begins
            behind the packed batch's tokens.
        segments: all segments of tokens, prompts first. Candidates of one row are consecutive.
        label_positions_N: positions whose output predicts a label; several labels may have one.
        labels_N: the tokens to predict.
        label_prompt_N: index in the bank, -1 for none.
        label_slot_N: ``PackedRow.slot`` of the row; -1 in a padding row.
        shared: which positions predict several labels; None if each predicts one.
        layout: how the segments attend, where that was prepared ahead.
        distilled_D: places among the N labels of those that learn from a teacher.
        teacher: the same rows behind their teachers, whose labels are the D in their order; a
            padding row where no row has one, but others of the step do; None if none of them does.
    """

    token_ids_T: Tensor
    position_ids_T: Tensor
    prompts: tuple[tuple[int, Segment], ...]
    past: tuple[tuple[int, Segment], ...]
    segments: tuple[Segment, ...]
    label_positions_N: Tensor
    labels_N: Tensor
    label_prompt_N: Tensor
    label_slot_N: Tensor
    shared: SharedPositions | None = None
    layout: Any = None
    distilled_D: Tensor | None = None
    teacher: PackedBatch | None = None

    def to(self, device: torch.device) -> PackedBatch:
        """On the device; from pinned memory without waiting for the copy."""
        return changed(self, lambda tensor: tensor.to(device, non_blocking=True))


def changed(value: T, change: Callable[[Tensor], Tensor]) -> T:
    """A dataclass with all its tensors changed, in tuples and dataclasses within too."""
    new: Any = value
    if isinstance(value, Tensor):
        new = change(value)
    elif isinstance(value, tuple):
        new = tuple(changed(item, change) for item in value)
    elif is_dataclass(value) and not isinstance(value, Segment):
        new = replace(
            value,  # type: ignore[type-var]
            **{f.name: changed(getattr(value, f.name), change) for f in fields(value) if f.init},
        )
    return cast(T, new)


@dataclass(frozen=True)
class PromptLengths:
    """Number of virtual tokens of every prompt in the bank, [K].

    Attributes:
        tokens: those that stand in the packed batch; 0 for a prompt of keys and values.
        past: those that are keys and values only; 0 for others.
    """

    tokens: tuple[int, ...]
    past: tuple[int, ...]


def build_packed_batch(
    packed_rows: Sequence[PackedRow],
    prompt_lengths: Sequence[int],
    past_lengths: Sequence[int] = (),
) -> PackedBatch:
    """Lay the packed rows end to end behind the prompts they read.

    Args:
        prompt_lengths: virtual tokens in the packed batch of every prompt in the bank, [K].
        past_lengths: virtual tokens that are keys and values only, [K]; none by default.
    """
    used = sorted(
        {packed_row.prompt for packed_row in packed_rows if packed_row.prompt is not None}
    )
    past = [k for k in used if past_lengths and past_lengths[k]]
    parts = _Parts()
    prompt_segments = {k: parts.read([0] * prompt_lengths[k]) for k in used if k not in past}
    prompts = tuple(prompt_segments.items())
    end = len(parts.token_ids) + sum(packed_row.num_tokens for packed_row in packed_rows)
    for k in past:
        prompt_segments[k] = Segment(end, past_lengths[k])
        end += past_lengths[k]
    for packed_row in packed_rows:
        prompt = None if packed_row.prompt is None else prompt_segments[packed_row.prompt]
        if packed_row.candidates:
            parts.add_candidates(packed_row, prompt)
        else:
            parts.add_row(packed_row, prompt)
    return parts.build(prompts, tuple((k, prompt_segments[k]) for k in past))


@dataclass
class _Parts:
    """Lists that grow into a packed batch's tensors."""

    token_ids: list[int] = field(default_factory=list)
    position_ids: list[int] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    label_positions: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    label_prompt: list[int] = field(default_factory=list)
    label_slot: list[int] = field(default_factory=list)
    distilled: list[int] = field(default_factory=list)
    any_candidates: bool = False

    def read(
        self, ids: Sequence[int], prefix: Segment | None = None, candidate: bool = False
    ) -> Segment:
        """Append tokens behind a prefix."""
        segment = Segment(len(self.token_ids), len(ids), prefix, candidate)
        self.segments.append(segment)
        self.token_ids += ids
        first = segment.prefix_length
        self.position_ids += range(first, first + len(ids))
        return segment

    def add_row(self, packed_row: PackedRow, prompt: Segment | None) -> None:
        """Append a row with its one target."""
        start = self.read(packed_row.example.input_ids, prompt).start
        if packed_row.teacher is not None:
            first = len(self.labels)
            self.distilled += range(first, first + packed_row.example.num_labels)
        for first, stop in packed_row.example.label_spans:
            # The output at one position predicts the token at the next.
            self.label_positions += range(start + first - 1, start + stop - 1)
        self._label(packed_row, packed_row.slot, packed_row.example)

    def add_candidates(self, packed_row: PackedRow, prompt: Segment | None) -> None:
        """Append the tokens that a row's candidates share, and those of each."""
        self.any_candidates = True
        row, shared = prompt, len(packed_row.shared_ids)
        row_start = len(self.token_ids)
        if shared:
            row = self.read(packed_row.shared_ids, prompt)
        for i, (example, ids) in enumerate(
            zip(packed_row.candidates, packed_row.own_ids, strict=True)
        ):
            own_start = len(self.token_ids) - shared
            if ids:
                self.read(ids, row, candidate=True)
            self.label_positions += (
                place + (row_start if place < shared else own_start)
                for first, stop in example.label_spans
                for place in range(first - 1, stop - 1)
            )
            self._label(packed_row, packed_row.slot + i, example)

    def _label(self, packed_row: PackedRow, slot: int, example: Example) -> None:
        for first, stop in example.label_spans:
            self.labels += example.input_ids[first:stop]
        count = example.num_labels
        self.label_prompt += [-1 if packed_row.prompt is None else packed_row.prompt] * count
        self.label_slot += [-1 if packed_row.is_padding else slot] * count

    def build(
        self,
        prompts: tuple[tuple[int, Segment], ...],
        past: tuple[tuple[int, Segment], ...],
    ) -> PackedBatch:
        label_positions_N = torch.tensor(self.label_positions)
        shared = None
        if self.any_candidates:
            shared = SharedPositions(*label_positions_N.unique(return_inverse=True))
        return PackedBatch(
            token_ids_T=torch.tensor(self.token_ids),
            position_ids_T=torch.tensor(self.position_ids),
            prompts=prompts,
            past=past,
            segments=tuple(self.segments),
            label_positions_N=label_positions_N,
            labels_N=torch.tensor(self.labels),
            label_prompt_N=torch.tensor(self.label_prompt),
            label_slot_N=torch.tensor(self.label_slot),
            shared=shared,
            distilled_D=torch.tensor(self.distilled, dtype=torch.long),
        )


def build_teacher_batch(packed_rows: Sequence[PackedRow]) -> PackedBatch:
    """The rows among these packed rows that learn from a teacher, behind it; or a padding row.

    The packed batch's prompts are counted by ``Teacher.index``.
    """
    lengths: dict[int, int] = {}
    distilled = []
    for packed_row in packed_rows:
        if packed_row.teacher is not None:
            teacher = packed_row.teacher
            lengths[teacher.index] = len(teacher.token_ids)
            distilled.append(
                PackedRow(teacher.continued_by(packed_row.example), teacher.index, packed_row.slot)
            )
    shortest = min(packed_rows, key=lambda packed_row: packed_row.example.num_tokens)
    padding_row = PackedRow(shortest.example, None, shortest.slot, is_padding=True)
    up_to = range(max(lengths, default=-1) + 1)
    return build_packed_batch(
        distilled or [padding_row], [lengths.get(index, 0) for index in up_to]
    )
