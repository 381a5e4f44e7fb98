"""Which waiting request joins which rank, within the limits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from trainer.evaluation.token_sampling import Sampling
from trainer.inference.requests import GenerationRequest
from trainer.inference.stream_batch import Join

#: Maximum tokens of the rows that one forward pass reads, padding included. Running rows wait
#: during this pass.
READ_TOKENS = 4096


@dataclass(frozen=True)
class Limits:
    """Limits of a decoder, over all ranks.

    Attributes:
        rows: requests that are decoded at the same time.
        tokens: rows times the length that the longest one can reach, with virtual tokens, input
            and generated text included; None: no limit. One row is always decoded.
        waiting: further requests that wait for room.
    """

    rows: int = 64
    tokens: int | None = None
    waiting: int = 1024


class Waiting(Protocol):
    """A waiting request."""

    number: int
    request: GenerationRequest
    prompt: int | None
    sampling: Sampling


class Schedule:
    """Assigns requests to ranks in the order in which they came."""

    def __init__(self, limits: Limits, ranks: int) -> None:
        self._rows = -(-limits.rows // ranks)
        self._tokens = None if limits.tokens is None else limits.tokens // ranks
        #: For each rank: number of a row -> length that it can reach.
        self._reach: list[dict[int, int]] = [{} for _ in range(ranks)]
        self._has_read = [False] * ranks

    def admit(self, waiting: Iterable[Waiting]) -> list[Join]:
        """Return the first waiting requests that fit, each with its rank.

        A rank that has read rows in the last forward pass decodes in the next one, so that rows
        that join cannot stop the others.
        """
        decodes = [bool(r) and had for r, had in zip(self._reach, self._has_read, strict=True)]
        joins: list[Join] = []
        for stream in waiting:
            request = stream.request
            rank = self._rank_for(request, joins, decodes)
            if rank is None:
                break
            self._reach[rank][stream.number] = request.num_tokens
            joins.append(
                Join(
                    stream.number,
                    rank,
                    request.input_ids,
                    stream.prompt,
                    request.prompt_at,
                    request.max_new_tokens,
                    stream.sampling,
                )
            )
        self._has_read = [any(join.rank == rank for join in joins) for rank in range(len(decodes))]
        return joins

    def leave(self, number: int) -> None:
        """Free the room of a row."""
        for rows in self._reach:
            rows.pop(number, None)

    def _rank_for(
        self, request: GenerationRequest, joins: list[Join], decodes: list[bool]
    ) -> int | None:
        """Return the rank with the fewest rows that has room."""
        ranks = sorted(range(len(self._reach)), key=lambda rank: len(self._reach[rank]))
        fits = (r for r in ranks if not decodes[r] and self._has_room(r, request, joins))
        return next(fits, None)

    def _has_room(self, rank: int, request: GenerationRequest, joins: list[Join]) -> bool:
        rows = self._reach[rank]
        if len(rows) >= self._rows:
            return False
        longest = max(request.num_tokens, *rows.values(), 0)
        if rows and self._tokens is not None and (len(rows) + 1) * longest > self._tokens:
            return False
        read = [len(join.input_ids) for join in joins if join.rank == rank]
        size = (len(read) + 1) * max(len(request.input_ids), *read, 0)
        return not read or size <= READ_TOKENS
