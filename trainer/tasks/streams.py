"""Packed streams: ``[prompt segments | row segments]``, no padding.

A prompt stands once per stream, not once per row: in a causal model its states do not depend on the
text behind it. Every row attends to its own prompt and to itself, and its positions go on where the
prompt's end. A prompt of keys and values per layer (prefix tuning) has no tokens in the stream: its
segment stands behind the last token, where attention finds its keys.

Shape letters: T tokens of a stream, N label positions, K prompts of the bank.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from trainer.tasks.table import Example
from trainer.tasks.teacher import Teacher

T = TypeVar("T")

#: A stream may be over its budget by this share, rather than that the step takes one more forward:
#: the virtual tokens, and that rows do not add up to the same number in every stream.
SLACK = 1 / 32


@dataclass(frozen=True)
class Piece:
    """One row as one prompt reads it.

    Attributes:
        prompt: index in the bank, or None for the base without a prompt.
        slot: the caller's own number for this row; losses come back by it.
        filler: keeps ranks in lockstep where there is no row left; its labels count nothing.
        teacher: whose distributions the labels' positions learn, instead of the labels.
    """

    example: Example
    prompt: int | None
    slot: int
    filler: bool = False
    teacher: Teacher | None = None


@dataclass(frozen=True)
class Segment:
    """A run of tokens that attends causally to itself, and to the whole of one other segment."""

    start: int
    length: int
    prefix_start: int = 0
    prefix_length: int = 0


@dataclass(frozen=True)
class Stream:
    """What the base reads in one forward.

    Attributes:
        token_ids_T: word ids; 0 where virtual tokens stand.
        position_ids_T: positions, restarting for every segment behind its prompt.
        prompts: (index in the bank, segment) of every prompt in the stream.
        past: (index in the bank, segment) of every prompt of keys and values; its segment begins
            behind the stream's tokens.
        segments: all segments of tokens, prompts first.
        label_positions_N: positions whose output predicts a label.
        labels_N: the tokens to predict.
        label_prompt_N: index in the bank, -1 for none.
        label_slot_N: ``Piece.slot`` of the row; -1 in a filler.
        layout: how the segments attend, where that was prepared ahead.
        distilled_D: places among the N labels of those that learn from a teacher.
        teacher: the same rows behind their teachers, whose labels are the D in their order; a
            filler where no row has one, but others of the step do; None if none of them does.
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
    layout: Any = None
    distilled_D: Tensor | None = None
    teacher: Stream | None = None

    def to(self, device: torch.device) -> Stream:
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
        tokens: those that stand in the stream; 0 for a prompt of keys and values.
        past: those that are keys and values only; 0 for others.
    """

    tokens: tuple[int, ...]
    past: tuple[int, ...]

    @classmethod
    def of(cls, prompts: Sequence[Tensor]) -> PromptLengths:
        """Of virtual tokens [P, H], or keys and values [P, L, 2, A, D], of every prompt."""
        is_past = [prompt.dim() > 2 for prompt in prompts]
        return cls(
            tuple(0 if past else len(p) for p, past in zip(prompts, is_past, strict=True)),
            tuple(len(p) if past else 0 for p, past in zip(prompts, is_past, strict=True)),
        )


def build_stream(
    pieces: Sequence[Piece], prompt_lengths: Sequence[int], past_lengths: Sequence[int] = ()
) -> Stream:
    """Lay the pieces end to end behind the prompts they read.

    Args:
        prompt_lengths: virtual tokens in the stream of every prompt in the bank, [K].
        past_lengths: virtual tokens that are keys and values only, [K]; none by default.
    """
    used = sorted({piece.prompt for piece in pieces if piece.prompt is not None})
    past = [k for k in used if past_lengths and past_lengths[k]]
    token_ids: list[int] = []
    position_ids: list[int] = []
    prompt_segments: dict[int, Segment] = {}
    for k in used:
        if k not in past:
            prompt_segments[k] = Segment(len(token_ids), prompt_lengths[k])
            token_ids += [0] * prompt_lengths[k]
            position_ids += range(prompt_lengths[k])
    segments = list(prompt_segments.values())
    prompts = tuple(prompt_segments.items())
    end = len(token_ids) + sum(len(piece.example.input_ids) for piece in pieces)
    for k in past:
        prompt_segments[k] = Segment(end, past_lengths[k])
        end += past_lengths[k]

    label_positions: list[int] = []
    labels: list[int] = []
    label_prompt: list[int] = []
    label_slot: list[int] = []
    distilled: list[int] = []
    for piece in pieces:
        start, ids = len(token_ids), piece.example.input_ids
        prefix = Segment(0, 0) if piece.prompt is None else prompt_segments[piece.prompt]
        segments.append(Segment(start, len(ids), prefix.start, prefix.length))
        token_ids += ids
        position_ids += range(prefix.length, prefix.length + len(ids))
        for first, stop in piece.example.label_spans:
            # The output at one position predicts the token at the next.
            label_positions += range(start + first - 1, start + stop - 1)
            labels += ids[first:stop]
        count = piece.example.num_labels
        if piece.teacher is not None:
            distilled += range(len(label_slot), len(label_slot) + count)
        label_prompt += [-1 if piece.prompt is None else piece.prompt] * count
        label_slot += [-1 if piece.filler else piece.slot] * count
    return Stream(
        token_ids_T=torch.tensor(token_ids),
        position_ids_T=torch.tensor(position_ids),
        prompts=prompts,
        past=tuple((k, prompt_segments[k]) for k in past),
        segments=tuple(segments),
        label_positions_N=torch.tensor(label_positions),
        labels_N=torch.tensor(labels),
        label_prompt_N=torch.tensor(label_prompt),
        label_slot_N=torch.tensor(label_slot),
        distilled_D=torch.tensor(distilled, dtype=torch.long),
    )


def build_teacher_stream(pieces: Sequence[Piece]) -> Stream:
    """The rows among these pieces that learn from a teacher, behind it; or a filler.

    The stream's prompts are counted by ``Teacher.index``.
    """
    lengths: dict[int, int] = {}
    taught = []
    for piece in pieces:
        if piece.teacher is not None:
            teacher = piece.teacher
            lengths[teacher.index] = len(teacher.token_ids)
            taught.append(Piece(teacher.behind(piece.example), teacher.index, piece.slot))
    shortest = min(pieces, key=lambda piece: piece.example.num_tokens)
    filler = Piece(shortest.example, None, shortest.slot, filler=True)
    up_to = range(max(lengths, default=-1) + 1)
    return build_stream(taught or [filler], [lengths.get(index, 0) for index in up_to])


def plan_streams(
    pieces: Sequence[Piece], prompt_lengths: Sequence[int], num_ranks: int, max_tokens: int
) -> list[list[list[Piece]]]:
    """Split pieces over ranks and streams: ``plan[rank][stream]`` is a list of pieces.

    Every rank gets the same number of streams, because an unequal number of forwards deadlocks
    ZeRO-3; a stream that would be empty gets a filler. Longest rows are placed first, each into the
    stream that holds the fewest tokens (longest-processing-time rule), so that ranks are nearly
    equally loaded. A pure function of its arguments: all ranks make the same plan.

    Args:
        max_tokens: of a stream, virtual tokens included, within ``SLACK``; a longer row is alone.

    Raises:
        ValueError: if ``pieces`` is empty.
    """
    if not pieces:
        raise ValueError("no rows to plan")
    order = sorted(range(len(pieces)), key=lambda i: (-pieces[i].example.num_tokens, i))
    most = int(max_tokens * (1 + SLACK))
    # A longer row fills one stream, and no more: with a row in each there is nothing left to split.
    total = sum(min(piece.example.num_tokens, most) for piece in pieces)
    num_streams = -(-total // (most * num_ranks)) * num_ranks
    enough = -(-len(pieces) // num_ranks) * num_ranks
    while True:
        streams = _fill(pieces, order, prompt_lengths, num_streams)
        tokens = [_tokens(stream, prompt_lengths) for stream in streams]
        full = any(t > most and len(s) > 1 for t, s in zip(tokens, streams, strict=True))
        if not full:
            break
        more = num_ranks * max(1, num_streams // (20 * num_ranks))
        num_streams = min(num_streams + more, enough)
    shortest = pieces[order[-1]]
    filler = Piece(shortest.example, shortest.prompt, shortest.slot, filler=True)
    streams = [stream or [filler] for stream in streams]
    return [streams[rank::num_ranks] for rank in range(num_ranks)]


def _fill(
    pieces: Sequence[Piece], order: Sequence[int], prompt_lengths: Sequence[int], num_streams: int
) -> list[list[Piece]]:
    streams: list[list[Piece]] = [[] for _ in range(num_streams)]
    loads = [(0, stream) for stream in range(num_streams)]
    seen: list[set[int]] = [set() for _ in range(num_streams)]
    for i in order:
        piece = pieces[i]
        load, lightest = loads[0]
        streams[lightest].append(piece)
        load += piece.example.num_tokens
        if piece.prompt is not None and piece.prompt not in seen[lightest]:
            seen[lightest].add(piece.prompt)
            load += prompt_lengths[piece.prompt]
        heapq.heapreplace(loads, (load, lightest))
    return streams


def _tokens(stream: Sequence[Piece], prompt_lengths: Sequence[int]) -> int:
    prompts = {piece.prompt for piece in stream if piece.prompt is not None}
    rows = sum(piece.example.num_tokens for piece in stream)
    return rows + sum(prompt_lengths[k] for k in prompts)


def portions(items: Iterable[T], num_tokens: Callable[[T], int], most: float) -> Iterator[list[T]]:
    """Items in order, in portions of at most so many tokens, or of one item."""
    portion: list[T] = []
    tokens = 0
    for item in items:
        own = num_tokens(item)
        tokens += own
        if portion and tokens > most:
            yield portion
            portion, tokens = [], own
        portion.append(item)
    if portion:
        yield portion
