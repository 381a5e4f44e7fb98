"""Continuous batching: requests join and leave one running batch over one sharded base.

Rank 0 schedules. Before each forward pass it broadcasts which rows join on which rank and which
leave; afterwards it gathers the new tokens of all ranks. All ranks run ``StreamingDecoder.run``,
rank 0 in a second thread, so that the main thread can submit requests.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from trainer.distributed.collectives import Ranks
from trainer.evaluation.token_sampling import Sampling, ScoredToken
from trainer.inference.requests import GenerationRequest
from trainer.inference.stream_batch import DecodingBatch, Join
from trainer.inference.stream_schedule import Limits, Schedule
from trainer.inference.stream_text import FinishReason, Piece, TextPieces
from trainer.model.prompted_model import PromptedBase
from trainer.prompts.soft_prompt import SoftPrompt
from trainer.runtime import stop_signals

#: Without requests, ranks exchange a plan this often, so that collectives do not time out.
IDLE_SECONDS = 1.0


class Busy(Exception):
    """As many requests are running and waiting as the limits allow."""


@dataclass(frozen=True)
class _Plan:
    """Next step of all ranks, broadcast from rank 0."""

    joins: tuple[Join, ...] = ()
    leaves: tuple[int, ...] = ()
    forward: bool = False
    end: bool = False


@dataclass(frozen=True)
class _Report:
    """Results of one rank, gathered on rank 0."""

    tokens: dict[int, ScoredToken]
    rows: int
    stop_requested: bool


class Stream:
    """A submitted request. Its pieces go to the function given to ``submit``."""

    def __init__(
        self,
        number: int,
        request: GenerationRequest,
        prompt: int | None,
        sampling: Sampling,
        on_piece: Callable[[Piece], object],
        at_end: bool,
    ) -> None:
        self.number, self.request, self.prompt, self.sampling = number, request, prompt, sampling
        self.ids: list[int] = []
        self._on_piece, self._at_end = on_piece, at_end
        self._text = TextPieces(request.stop)
        self._pending: list[ScoredToken] = []

    def add(self, token: ScoredToken) -> FinishReason | None:
        """Add a token, deliver text that is settled, and return the reason if this is the end."""
        self.ids.append(token.token_id)
        self._pending.append(token)
        finish: FinishReason | None = None
        if self.request.stop.is_completed(self.ids):
            finish = "stop"
        elif len(self.ids) >= self.request.max_new_tokens:
            finish = "length"
        if finish is None and not self._at_end and (text := self._text.next(self.ids)):
            self._deliver(text, None)
        return finish

    def end(self, finish: FinishReason) -> None:
        """Deliver the last piece."""
        self._deliver(self._text.next(self.ids, is_last=True), finish)

    def _deliver(self, text: str, finish: FinishReason | None) -> None:
        tokens, self._pending = tuple(self._pending), []
        self._on_piece(Piece(text, tokens, finish))


class StreamingDecoder:
    """Decodes requests with different prompts in one batch.

    Args:
        prompts: all prompts that requests may name, on the engine's device.
        on_end: called on rank 0 when the decoder ends without ``close``, with the error; or with
            None when another rank has received a stop signal, which does not end decoding.

    Attributes:
        rows: rows in the caches of all ranks after the last forward pass.
        generated: tokens so far.
        failure: the error that ended the decoder, on rank 0.
    """

    def __init__(
        self,
        engine: Ranks,
        base: PromptedBase,
        prompts: Sequence[SoftPrompt] = (),
        limits: Limits | None = None,
        on_end: Callable[[BaseException | None], object] = lambda error: None,
    ) -> None:
        self._engine, self._base, self._prompts = engine, base, list(prompts)
        self.limits = limits or Limits()
        self._schedule = Schedule(self.limits, engine.world_size)
        self._on_end = on_end
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._waiting: deque[Stream] = deque()
        self._running: dict[int, Stream] = {}
        self._leaving: list[int] = []
        self._closing = False
        self.rows = self.generated = 0
        self.failure: BaseException | None = None

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def submit(
        self,
        request: GenerationRequest,
        sampling: Sampling,
        on_piece: Callable[[Piece], object],
        *,
        at_end: bool = False,
    ) -> Stream:
        """Add a request; on rank 0, from any thread.

        Args:
            request: its prompt is one of the decoder's.
            on_piece: receives the pieces, in the decoder's thread; it must not block.
            at_end: deliver one piece, when the request ends.

        Raises:
            Busy: too many requests are running and waiting.
        """
        prompt = None if request.prompt is None else self._prompts.index(request.prompt)
        stream = Stream(next(self._numbers), request, prompt, sampling, on_piece, at_end)
        with self._changed:
            if self._closing:
                stream.end("failed" if self.failure else "cancelled")
                return stream
            unfinished = len(self._running) + len(self._waiting)
            if unfinished >= self.limits.rows + self.limits.waiting:
                raise Busy
            self._waiting.append(stream)
            self._changed.notify()
        return stream

    def cancel(self, stream: Stream) -> None:
        """End a request before the next forward pass; without effect if it has ended."""
        with self._changed:
            if stream in self._waiting:
                self._waiting.remove(stream)
            elif self._running.pop(stream.number, None):
                self._leave(stream)
            else:
                return
            self._changed.notify()
        stream.end("cancelled")

    def stream(
        self, request: GenerationRequest, sampling: Sampling | None = None
    ) -> Iterator[Piece]:
        """Yield the pieces of one request; on rank 0. Closing the iterator cancels the request."""
        pieces: queue.SimpleQueue[Piece] = queue.SimpleQueue()
        stream = self.submit(request, sampling or Sampling(), pieces.put)
        try:
            while True:
                piece = pieces.get()
                if piece.finish == "failed":
                    raise RuntimeError("decoding has failed") from self.failure
                yield piece
                if piece.finish is not None:
                    return
        finally:
            self.cancel(stream)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run the decoder in a thread of rank 0 while the block submits requests."""
        thread = threading.Thread(target=self.run, name="decoder", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self.close()
            thread.join()

    def close(self) -> None:
        """End all requests and, on all ranks, ``run``."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    def run(self) -> None:
        """Decode until rank 0 calls ``close``; a collective.

        A stop signal to another rank than 0 does not end it, but calls ``on_end`` of rank 0.
        """
        if not self._engine.is_main:
            stop_signals.defer()
            self._loop()
            return
        try:
            self._loop()
        except BaseException as error:
            self.failure = error
            self._end_all("failed")
            self._on_end(error)

    def _loop(self) -> None:
        engine = self._engine
        if engine.device.type == "cuda":
            torch.cuda.set_device(engine.device)  # a setting of each thread
        batch = DecodingBatch(self._base, self._prompts, engine.device)
        stop_noted = False
        with self._base.unpacked():
            while True:
                plan = engine.broadcast(self._plan() if engine.is_main else None)
                for number in plan.leaves:
                    batch.remove(number)
                if plan.end:
                    break
                joins = [join for join in plan.joins if join.rank == engine.rank]
                tokens = batch.forward(joins) if plan.forward else {}
                report = _Report(tokens, len(batch), stop_signals.stop_requested())
                reports = engine.all_gather(report)
                if not engine.is_main:
                    continue
                self.rows = sum(report.rows for report in reports)
                self._deliver(reports)
                if not stop_noted and any(report.stop_requested for report in reports[1:]):
                    stop_noted = True
                    self._on_end(None)
        if engine.is_main:
            self.rows = 0
            self._end_all("cancelled")

    def _plan(self) -> _Plan:
        """Wait until there is something to do, at most ``IDLE_SECONDS``."""
        with self._changed:
            if not (self._waiting or self._running or self._leaving or self._closing):
                self._changed.wait(IDLE_SECONDS)
            leaves, self._leaving = tuple(self._leaving), []
            if self._closing:
                return _Plan(leaves=(*leaves, *self._running), end=True)
            joins = self._schedule.admit(self._waiting)
            for _ in joins:
                stream = self._waiting.popleft()
                self._running[stream.number] = stream
            return _Plan(tuple(joins), leaves, forward=bool(self._running))

    def _deliver(self, reports: Sequence[_Report]) -> None:
        tokens = {n: token for report in reports for n, token in report.tokens.items()}
        self.generated += len(tokens)
        for number, token in tokens.items():
            with self._changed:
                stream = self._running.get(number)  # None: cancelled during the forward pass
            if stream is None or (finish := stream.add(token)) is None:
                continue
            with self._changed:
                ended = self._running.pop(number, None)
                if ended is not None:
                    self._leave(ended)
            if ended is not None:
                ended.end(finish)

    def _leave(self, stream: Stream) -> None:
        self._leaving.append(stream.number)
        self._schedule.leave(stream.number)

    def _end_all(self, finish: FinishReason) -> None:
        with self._changed:
            self._closing = True
            streams = [*self._running.values(), *self._waiting]
            self._running.clear()
            self._waiting.clear()
        for stream in streams:
            stream.end(finish)
