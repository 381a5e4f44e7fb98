"""Packed batches: ``[prompt segments | row segments]`` without padding.

A packed batch contains each prompt once, not once per row: in a causal model, the states of a
prompt do not depend on the text after it. Every row attends to its own prompt and to itself; its
positions continue those of the prompt. A prompt's segment may also contain text around the virtual
tokens, with which rows begin: rows with the same such text share the segment. A prompt of keys and
values per layer (prefix tuning) has no tokens in the packed batch: its segment is after the last
token, where attention puts its keys, and is continued by the text at the beginning of its rows.

A row with several texts that share a beginning is a tree of segments (``token_tree``): a row with
candidate targets, or a dialogue with branches. A segment attends to all segments that it continues.
So a packed batch has up to four levels: prompt, text with which all rows begin, row, candidates.

Shape letters: T tokens of a packed batch, N labels, U positions that predict them, K prompts of the
bank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from trainer.packing.packed_row import (
    NO_PROMPT,
    PackedRow,
    SegmentKey,
    segment_length,
    teacher_rows,
)
from trainer.packing.token_tree import ROOT

T = TypeVar("T")


@dataclass(frozen=True)
class Segment:
    """Consecutive tokens that attend causally to themselves, and to all tokens of their prefixes.

    Attributes:
        prefix: the segment that this one continues, which may have a prefix itself.
        sibling: one of several short segments with this prefix, which are consecutive.
    """

    start: int
    length: int
    prefix: Segment | None = None
    sibling: bool = False

    @property
    def end(self) -> int:
        return self.start + self.length

    @property
    def prefixes(self) -> tuple[Segment, ...]:
        """All segments that this one continues, in order."""
        return () if self.prefix is None else (*self.prefix.prefixes, self.prefix)

    @property
    def prefix_length(self) -> int:
        """Tokens of all prefixes: the position of the segment's first token."""
        return 0 if self.prefix is None else self.prefix.prefix_length + self.prefix.length


@dataclass(frozen=True)
class PackedBatch:
    """The input of one forward of the base.

    Attributes:
        token_ids_T: token ids; 0 at the positions of virtual tokens.
        position_ids_T: every row continues the positions of its prompt.
        prompts: (index in the bank, positions of its virtual tokens), ascending. A prompt occurs
            more than once if its rows have different text before the virtual tokens.
        first_row: index of the first segment that is part of a single row.
        past: (index in the bank, segment) of every prompt of keys and values; these segments are
            after the last token.
        segments: all segments of tokens, prompts first.
        label_positions_N: position whose output predicts the label; labels may share one.
        labels_N: ids of the tokens to predict.
        label_prompt_N: index in the bank; -1 without a prompt.
        label_slot_N: ``PackedRow.slot`` of the row; -1 in a padding row.
        distinct_U: the distinct label positions, ascending.
        place_N: index of each label's position in ``distinct_U`` if rows have candidates, whose
            labels share positions, so that the head reads each of them once; otherwise None.
        layout: of attention over the segments, if prefetching has prepared it.
        distilled_D: indices of the labels that learn from a teacher.
        teacher: batch of the rows with a teacher, after its text; its labels are the D distilled
            ones in the same order. If only other batches of the step have such rows, a padding row;
            if none has, None.
    """

    token_ids_T: Tensor
    position_ids_T: Tensor
    prompts: tuple[tuple[int, Segment], ...]
    past: tuple[tuple[int, Segment], ...]
    segments: tuple[Segment, ...]
    first_row: int
    label_positions_N: Tensor
    labels_N: Tensor
    label_prompt_N: Tensor
    label_slot_N: Tensor
    distinct_U: Tensor
    place_N: Tensor | None = None
    layout: Any = None
    distilled_D: Tensor | None = None
    teacher: PackedBatch | None = None

    @property
    def read_positions(self) -> Tensor:
        """Positions whose hidden states the head reads: U distinct ones, or one per label, [N]."""
        return self.label_positions_N if self.place_N is None else self.distinct_U

    @property
    def num_learned(self) -> int:
        """Number of the first tokens, all prompts; the embeddings of those after are constant."""
        return sum(segment.length for segment in self.segments[: self.first_row])

    def to(self, device: torch.device) -> PackedBatch:
        """Copy to the device, from pinned memory without waiting."""
        return map_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))


def map_tensors(value: T, change: Callable[[Tensor], Tensor]) -> T:
    """Apply ``change`` to all tensors in nested tuples and dataclasses; return a copy."""
    new: Any = value
    if isinstance(value, Tensor):
        new = change(value)
    elif isinstance(value, tuple):
        new = tuple(map_tensors(item, change) for item in value)
    elif is_dataclass(value) and not isinstance(value, Segment):
        new = replace(
            value,  # type: ignore[type-var]
            **{
                f.name: map_tensors(getattr(value, f.name), change) for f in fields(value) if f.init
            },
        )
    return cast(T, new)


def build_packed_batch(
    rows: Sequence[PackedRow],
    prompt_lengths: Sequence[int],
    past_lengths: Sequence[int] = (),
) -> PackedBatch:
    """Concatenate rows after the prompts that they attend to.

    Args:
        prompt_lengths: positions of every prompt, as ``PromptLengths.tokens``.
        past_lengths: as ``PromptLengths.past``; none by default.
    """
    keys = dict.fromkeys(row.segment_key for row in rows if row.segment_key is not None)
    # By prompt, which all ranks number alike; Python's sort keeps the order of the rows otherwise.
    ordered = sorted(keys, key=lambda key: key[0])
    past = list(
        dict.fromkeys(
            k for k, _, _ in ordered if k != NO_PROMPT and past_lengths and past_lengths[k]
        )
    )
    builder = _BatchBuilder()
    end = sum(segment_length(key, prompt_lengths) for key in ordered)
    end += sum(row.num_tokens for row in rows)
    past_segments: dict[int, Segment] = {}
    for k in past:
        past_segments[k] = Segment(end, past_lengths[k])
        end += past_lengths[k]
    prompt_segments: dict[SegmentKey | None, Segment | None] = {None: None}
    prompts = []
    for key in ordered:
        k, at, ids = key
        if k != NO_PROMPT and k not in past_segments:
            prompts.append((k, Segment(len(builder.token_ids) + at, prompt_lengths[k])))
            ids = (*ids[:at], *[0] * prompt_lengths[k], *ids[at:])
        prefix = past_segments.get(k)
        prompt_segments[key] = builder.append(ids, prefix) if ids or prefix is None else prefix
    first_row = len(builder.segments)
    for row in rows:
        builder.add_row(row, prompt_segments[row.segment_key])
    return builder.build(tuple(prompts), tuple(past_segments.items()), first_row)


@dataclass
class _BatchBuilder:
    token_ids: list[int] = field(default_factory=list)
    position_ids: list[int] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    label_positions: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    label_prompt: list[int] = field(default_factory=list)
    label_slot: list[int] = field(default_factory=list)
    distilled: list[int] = field(default_factory=list)
    any_candidates: bool = False

    def append(
        self, ids: Sequence[int], prefix: Segment | None = None, sibling: bool = False
    ) -> Segment:
        segment = Segment(len(self.token_ids), len(ids), prefix, sibling)
        self.segments.append(segment)
        self.token_ids += ids
        first = segment.prefix_length
        self.position_ids += range(first, first + len(ids))
        return segment

    def add_row(self, row: PackedRow, prompt: Segment | None) -> None:
        """Append the segments and labels of a row."""
        self.any_candidates = self.any_candidates or bool(row.candidates)
        tree, start, placed = row.tree, len(self.token_ids), list[Segment]()
        for part in tree.segments:
            prefix = prompt if part.parent == ROOT else placed[part.parent]
            ids = tree.token_ids[part.start : part.stop]
            placed.append(self.append(ids, prefix, part.sibling))
        if row.teacher is not None:
            first = len(self.labels)
            self.distilled += range(first, first + row.example.num_labels)
        before = -1 if prompt is None else prompt.end - 1
        for number, target in enumerate(tree.targets):
            self.label_positions += (before if i < 0 else start + i for i in target.positions)
            self.labels += target.labels
            count = len(target.labels)
            self.label_prompt += [-1 if row.prompt is None else row.prompt] * count
            self.label_slot += [-1 if row.is_padding else row.slot + number] * count

    def build(
        self,
        prompts: tuple[tuple[int, Segment], ...],
        past: tuple[tuple[int, Segment], ...],
        first_row: int,
    ) -> PackedBatch:
        label_positions_N = torch.tensor(self.label_positions)
        distinct_U, place_N = label_positions_N.unique(return_inverse=True)
        return PackedBatch(
            token_ids_T=torch.tensor(self.token_ids),
            position_ids_T=torch.tensor(self.position_ids),
            prompts=prompts,
            past=past,
            segments=tuple(self.segments),
            first_row=first_row,
            label_positions_N=label_positions_N,
            labels_N=torch.tensor(self.labels),
            label_prompt_N=torch.tensor(self.label_prompt),
            label_slot_N=torch.tensor(self.label_slot),
            distinct_U=distinct_U,
            place_N=place_N if self.any_candidates else None,
            distilled_D=torch.tensor(self.distilled, dtype=torch.long),
        )


def build_teacher_batch(rows: Sequence[PackedRow]) -> PackedBatch:
    """Pack the rows with a teacher after its text, as ``teacher_rows``."""
    return build_packed_batch(*teacher_rows(rows))
