"""Assigns rows to ranks and packed batches; a pure function, so that all ranks agree."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

from trainer.packing.packed_row import PackedRow, SegmentKey, segment_length

T = TypeVar("T")

#: Share by which a packed batch may exceed its budget, so that a few virtual tokens, or unequal
#: loads, do not add a forward to the step.
SLACK = 1 / 32
#: Share of a packed batch that the segments of several prompts may take, where rows can be grouped.
SEGMENT_SHARE = 1 / 8


def plan_batches(
    rows: Sequence[PackedRow], prompt_lengths: Sequence[int], num_ranks: int, max_tokens: int
) -> list[list[list[PackedRow]]]:
    """Assign rows to ranks and packed batches: ``plan[rank][batch]`` is a list of rows.

    Every rank gets the same number of batches, because unequal numbers of forwards deadlock ZeRO-3;
    an empty batch gets a padding row. Rows are placed from long to short, each into the batch with
    the fewest tokens (longest-processing-time rule), so that ranks have nearly equal loads.

    Args:
        max_tokens: of a packed batch with its virtual tokens, within ``SLACK``; a longer row gets a
            separate batch.

    Raises:
        ValueError: ``rows`` is empty.
    """
    if not rows:
        raise ValueError("no rows to plan")
    order = sorted(range(len(rows)), key=lambda i: (-rows[i].num_tokens, i))
    most = int(max_tokens * (1 + SLACK))
    # Count a row over the limit as one full batch. More than one batch per row is never needed.
    total = sum(min(row.num_tokens, most) for row in rows)
    num_batches = -(-total // (most * num_ranks)) * num_ranks
    enough = -(-len(rows) // num_ranks) * num_ranks
    while True:
        batches = _fill(rows, order, prompt_lengths, num_batches)
        tokens = [_tokens(batch, prompt_lengths) for batch in batches]
        full = any(t > most and len(s) > 1 for t, s in zip(tokens, batches, strict=True))
        if not full:
            break
        more = num_ranks * max(1, num_batches // (20 * num_ranks))
        num_batches = min(num_batches + more, enough)
    shortest = rows[order[-1]]
    padding_row = replace(shortest, is_padding=True, teacher=None)
    batches = [batch or [padding_row] for batch in batches]
    return [batches[rank::num_ranks] for rank in range(num_ranks)]


def _fill(
    rows: Sequence[PackedRow],
    order: Sequence[int],
    prompt_lengths: Sequence[int],
    num_batches: int,
) -> list[list[PackedRow]]:
    batches: list[list[PackedRow]] = [[] for _ in range(num_batches)]
    loads = [(0, batch) for batch in range(num_batches)]
    seen: list[set[SegmentKey]] = [set() for _ in range(num_batches)]
    for i in order:
        row = rows[i]
        load, lightest = loads[0]
        batches[lightest].append(row)
        load += row.num_tokens
        key = row.segment_key
        if key is not None and key not in seen[lightest]:
            seen[lightest].add(key)
            load += segment_length(key, prompt_lengths)
        heapq.heapreplace(loads, (load, lightest))
    return batches


def _tokens(batch: Sequence[PackedRow], prompt_lengths: Sequence[int]) -> int:
    keys = {row.segment_key for row in batch if row.segment_key is not None}
    text = sum(row.num_tokens for row in batch)
    return text + sum(segment_length(key, prompt_lengths) for key in keys)


def windows(
    rows: Iterable[PackedRow], prompt_lengths: Sequence[int], max_tokens: int, num_batches: int
) -> Iterator[list[PackedRow]]:
    """Yield rows in order, in lists that ``plan_batches`` may mix.

    Every packed batch of a list may contain the segments of all its prompts, so a list has few.

    Args:
        max_tokens: of a packed batch.
        num_batches: maximum number of packed batches that a list fills.
    """
    window = list[PackedRow]()
    tokens, segments = 0, dict[SegmentKey, int]()
    for row in rows:
        key, own = row.segment_key, row.num_tokens
        new = 0 if key is None or key in segments else segment_length(key, prompt_lengths)
        crowded = new and new + sum(segments.values()) > SEGMENT_SHARE * max_tokens
        if window and (crowded or tokens + own > num_batches * max_tokens):
            yield window
            window, tokens, segments = [], 0, {}
            new = 0 if key is None else segment_length(key, prompt_lengths)
        window.append(row)
        tokens += own
        if key is not None:
            segments.setdefault(key, new)
    if window:
        yield window


def portions(items: Iterable[T], num_tokens: Callable[[T], int], most: float) -> Iterator[list[T]]:
    """Yield items in order, in lists of at most ``most`` tokens; a larger item is alone."""
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
