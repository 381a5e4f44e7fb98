"""Which rows every rank reads in which stream. A pure function of the rows: all ranks agree."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

from trainer.packing.packed_batch import PackedRow

T = TypeVar("T")

#: A stream may be over its budget by this share, rather than that the step takes one more forward:
#: the virtual tokens, and that rows do not add up to the same number in every stream.
SLACK = 1 / 32


def plan_streams(
    pieces: Sequence[PackedRow], prompt_lengths: Sequence[int], num_ranks: int, max_tokens: int
) -> list[list[list[PackedRow]]]:
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
    order = sorted(range(len(pieces)), key=lambda i: (-pieces[i].num_tokens, i))
    most = int(max_tokens * (1 + SLACK))
    # A longer row fills one stream, and no more: with a row in each there is nothing left to split.
    total = sum(min(piece.num_tokens, most) for piece in pieces)
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
    filler = replace(shortest, filler=True, teacher=None)
    streams = [stream or [filler] for stream in streams]
    return [streams[rank::num_ranks] for rank in range(num_ranks)]


def _fill(
    pieces: Sequence[PackedRow],
    order: Sequence[int],
    prompt_lengths: Sequence[int],
    num_streams: int,
) -> list[list[PackedRow]]:
    streams: list[list[PackedRow]] = [[] for _ in range(num_streams)]
    loads = [(0, stream) for stream in range(num_streams)]
    seen: list[set[int]] = [set() for _ in range(num_streams)]
    for i in order:
        piece = pieces[i]
        load, lightest = loads[0]
        streams[lightest].append(piece)
        load += piece.num_tokens
        if piece.prompt is not None and piece.prompt not in seen[lightest]:
            seen[lightest].add(piece.prompt)
            load += prompt_lengths[piece.prompt]
        heapq.heapreplace(loads, (load, lightest))
    return streams


def _tokens(stream: Sequence[PackedRow], prompt_lengths: Sequence[int]) -> int:
    prompts = {piece.prompt for piece in stream if piece.prompt is not None}
    rows = sum(piece.num_tokens for piece in stream)
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
