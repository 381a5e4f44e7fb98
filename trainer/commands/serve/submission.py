"""Requests in the decoder's queue, and their pieces in the event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from functools import partial

from fastapi import Request

from trainer.commands.serve.errors import ApiError
from trainer.commands.serve.metrics import Metrics
from trainer.evaluation.token_sampling import Sampling
from trainer.inference.requests import GenerationRequest
from trainer.inference.stream import Busy, Stream, StreamingDecoder
from trainer.inference.stream_text import Piece

RETRY_SECONDS = 5


class Submission:
    """All choices of one HTTP request, decoded together.

    A client that disconnects cancels them, whether they are running or waiting.

    Args:
        requests: each with its sampling.
        at_end: deliver one piece per choice.

    Attributes:
        is_disconnected: the client has closed the connection.

    Raises:
        ApiError: too many requests are waiting.
    """

    def __init__(
        self,
        decoder: StreamingDecoder,
        metrics: Metrics,
        model: str,
        requests: Sequence[tuple[GenerationRequest, Sampling]],
        http_request: Request,
        *,
        at_end: bool,
    ) -> None:
        self._decoder, self._metrics, self._model = decoder, metrics, model
        self._started = time.monotonic()
        self._at_end = at_end
        self._first_token: float | None = None
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        self._unfinished = len(requests)
        self.is_disconnected = False
        self._streams: list[Stream] = []
        self.num_input_tokens = sum(len(request.input_ids) for request, _ in requests)
        try:
            for i, (request, sampling) in enumerate(requests):
                on_piece = partial(self._put, i)
                stream = decoder.submit(request, sampling, on_piece, at_end=at_end)
                self._streams.append(stream)
        except Busy:
            self._cancel()
            limits = decoder.limits
            raise ApiError(
                429,
                f"the server answers {limits.rows} requests at the same time (--max-concurrent) "
                f"and {limits.waiting} are waiting (--max-waiting); retry later",
                code="rate_limit_exceeded",
                retry_after=RETRY_SECONDS,
            ) from None
        metrics.input_tokens += self.num_input_tokens
        self._watcher = asyncio.create_task(self._watch(http_request))

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Yield (index of the choice, piece) until all choices have ended."""
        try:
            while self._unfinished:
                i, piece = await self._pieces.get()
                if piece.tokens and self._first_token is None:
                    self._first_token = time.monotonic()
                if piece.finish is not None:
                    self._unfinished -= 1
                    self._metrics.choices[self._model, piece.finish] += 1
                yield i, piece
            ended = time.monotonic()
            first = None if self._at_end else (self._first_token or ended) - self._started
            self._metrics.note_answer(self._model, ended - self._started, first)
        finally:
            self._watcher.cancel()
            self._cancel()

    async def _watch(self, http_request: Request) -> None:
        """Cancel the choices when the client disconnects."""
        while (await http_request.receive())["type"] != "http.disconnect":
            pass
        self.is_disconnected = True
        self._cancel()

    def _cancel(self) -> None:
        for stream in self._streams:
            self._decoder.cancel(stream)

    def _put(self, number: int, piece: Piece) -> None:
        """Receive a piece in the decoder's thread."""
        with suppress(RuntimeError):  # the event loop has ended
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, (number, piece))
