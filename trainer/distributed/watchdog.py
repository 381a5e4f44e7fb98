"""Detect ranks that hang: which rank, at which step, in which collective. Standard library only.

A collective waits for every rank, so one suspended rank stops all of them without a message. Each
rank therefore runs two threads. One writes this rank's heartbeats to a store and, if the main
thread has made no progress for a while, reads those of the other ranks. The other thread decides
whether a rank hangs. This second thread never reads the store, which rank 0 holds: if rank 0 hangs,
every read hangs.

Time is counted in iterations of the deciding thread, not by a clock, so that suspending and
resuming a whole job is not reported as a hang.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from trainer.runtime.errors import EXIT_FAILURE

if TYPE_CHECKING:
    from torch.distributed import Store

#: Seconds between two heartbeats of a rank, and between two reads of the others'.
HEARTBEAT_SECONDS = 1.0
#: Seconds without progress of the main thread after which other ranks' heartbeats are read.
IDLE_SECONDS = 5.0
#: A step may take this many times as long as the slowest step before it.
MAX_SLOWDOWN = 20
#: File in ``logs`` with the reason for aborting, which the launcher prints.
LOST = "lost.txt"
#: Number of ranks that a message lists.
MAX_NAMED_RANKS = 4


@dataclass(frozen=True)
class Heartbeat:
    """The state of a rank when it sent the heartbeat.

    Attributes:
        number: increases by one with every heartbeat.
        step, count, collective: as in ``CollectiveTracker``.
        left: the rank has stopped its watchdog and takes part in no further collective.
    """

    host: str
    number: int
    step: int
    count: int
    collective: str
    left: bool = False


class CollectiveTracker:
    """Progress of this rank's main thread.

    Attributes:
        step: the current or last training step.
        count: number of collectives begun since that step began.
        collective: the last of these.
        events: number of beginnings and ends of collectives and steps.
        slowest: seconds of the slowest step, excluding the first, which includes compilation.
    """

    def __init__(self) -> None:
        self.step = self.count = self.events = 0
        self.collective = "startup"
        self.in_step = self.waiting = False
        self.slowest: float | None = None
        self._steps = 0

    def begin(self, collective: str) -> None:
        """Record the beginning of a collective whose end is not observed."""
        self.collective = collective
        self.count += 1
        self.events += 1

    @contextmanager
    def during(self, collective: str) -> Iterator[None]:
        """Record the beginning and the end of a collective."""
        self.begin(collective)
        self.waiting = True
        try:
            yield
        finally:
            self.waiting = False
            self.events += 1

    @contextmanager
    def training_step(self, step: int) -> Iterator[None]:
        """Record the beginning, the end and the duration of a training step."""
        self.step, self.count, self.in_step = step, 0, True
        self.events += 1
        started = time.monotonic()
        try:
            yield
        finally:
            self.in_step = False
            self.events += 1
        self._steps += 1
        if self._steps > 1:
            self.slowest = max(self.slowest or 0.0, time.monotonic() - started)


class Watchdog:
    """Detects other ranks that hang while this rank makes no progress.

    Args:
        silence_seconds: maximum time without a heartbeat from a rank.
        timeout_seconds: maximum time in a collective outside of training steps.
        abort: called in a thread with a description of the problem; must end this process.
    """

    def __init__(
        self,
        tracker: CollectiveTracker,
        store: Store,
        rank: int,
        world_size: int,
        host: str,
        *,
        silence_seconds: float,
        timeout_seconds: float,
        abort: Callable[[str], object],
        heartbeat_seconds: float = HEARTBEAT_SECONDS,
        idle_seconds: float = IDLE_SECONDS,
    ) -> None:
        self._tracker, self._store, self._host = tracker, store, host
        self._rank, self._keys = rank, [f"promptshard/beat/{r}" for r in range(world_size)]
        self._silence, self._timeout = silence_seconds, timeout_seconds
        self._abort, self._interval, self._idle = abort, heartbeat_seconds, idle_seconds
        self._stopped = threading.Event()
        self._reads_others = False
        self._sent = self._reads = 0
        self._heartbeats: list[Heartbeat] = []
        self._send()

    def start(self) -> None:
        """Start the threads. Every rank must have created its watchdog before."""
        for work in (self._exchange_heartbeats, self._detect_hangs):
            threading.Thread(target=work, daemon=True, name="watchdog").start()

    def stop(self) -> None:
        """Stop the threads and tell the other ranks not to expect further heartbeats."""
        self._stopped.set()
        with suppress(Exception):  # rank 0 may have left already
            self._send()

    def wait_for_rank_0(self) -> None:
        """Wait until rank 0 has stopped its watchdog or ended, at most ``timeout_seconds``."""
        deadline = time.monotonic() + self._timeout
        with suppress(Exception):  # rank 0 has ended
            while self._rank != 0 and time.monotonic() < deadline:
                (heartbeat,) = self._store.multi_get(self._keys[:1])
                if json.loads(heartbeat)["left"]:
                    return
                time.sleep(self._interval)

    def _send(self) -> None:
        self._sent += 1
        tracker = self._tracker
        heartbeat = Heartbeat(
            self._host,
            self._sent,
            tracker.step,
            tracker.count,
            tracker.collective,
            self._stopped.is_set(),
        )
        self._store.set(self._keys[self._rank], json.dumps(asdict(heartbeat)))

    def _exchange_heartbeats(self) -> None:
        while not self._stopped.wait(self._interval):
            try:
                self._send()
                if self._reads_others:
                    values = self._store.multi_get(self._keys)
                    self._heartbeats = [Heartbeat(**json.loads(value)) for value in values]
                    self._reads += 1
            except Exception:  # rank 0 has ended, or its host is unreachable
                continue

    def _detect_hangs(self) -> None:
        events_before = -1
        numbers: dict[int, int] = {}
        silent: dict[int, float] = {}
        idle, unanswered, reads = 0.0, 0.0, 0
        while not self._stopped.wait(self._interval):
            events = self._tracker.events
            if events != events_before:
                events_before, idle, numbers, silent = events, 0.0, {}, {}
                self._reads_others = False
                continue
            idle += self._interval
            self._reads_others = idle >= self._idle
            if not self._reads_others:
                unanswered, reads = 0.0, self._reads
                continue
            if self._reads == reads:
                unanswered += self._interval
            else:
                unanswered, reads = 0.0, self._reads
                for rank, heartbeat in enumerate(self._heartbeats):
                    alive = heartbeat.left or numbers.get(rank) != heartbeat.number
                    silent[rank] = 0.0 if alive else silent.get(rank, 0.0) + self._interval
                    numbers[rank] = heartbeat.number
            lost = [r for r, seconds in silent.items() if seconds >= self._silence]
            if unanswered >= self._silence:  # the store, which rank 0 holds, does not answer
                lost = [0]
            if lost and lost != [self._rank]:
                self._abort(self._describe_lost(lost))
                return
            if idle >= self._max_idle_seconds():
                self._abort(self._describe_stuck(idle))
                return

    def _max_idle_seconds(self) -> float:
        if self._tracker.in_step and self._tracker.slowest is not None:
            slowest = MAX_SLOWDOWN * self._tracker.slowest
            return min(self._timeout, max(2 * self._silence, slowest))
        return self._timeout if self._tracker.waiting or self._tracker.in_step else float("inf")

    def _describe_lost(self, lost: Sequence[int]) -> str:
        heartbeats = dict(enumerate(self._heartbeats))
        return (
            f"{_names(lost, heartbeats)} stopped responding {self._silence:g} s ago (process "
            f"suspended, or host lost); rank {self._rank} is waiting in {_place(self._tracker)}; "
            "aborting"
        )

    def _describe_stuck(self, seconds: float) -> str:
        """Name the ranks that have begun the fewest collectives, unless all are at the same one."""
        heartbeats = {rank: beat for rank, beat in enumerate(self._heartbeats) if not beat.left}
        places = {rank: (beat.step, beat.count) for rank, beat in heartbeats.items()}
        last = [rank for rank, place in places.items() if place == min(places.values())]
        problem = f"rank {self._rank} made no progress for {seconds:g} s in {_place(self._tracker)}"
        if not places:
            return f"{problem}, and no other rank responds: the network may be down"
        if len(last) == len(places):
            return f"{problem}, and neither did the others: the network between them may be down"
        return f"{_names(last, heartbeats)} hangs after {_place(heartbeats[last[0]])}; {problem}"


def _place(state: CollectiveTracker | Heartbeat) -> str:
    """The last collective that a rank has begun."""
    return f"{state.collective} (step {state.step}, collective {state.count} of the step)"


def _names(ranks: Sequence[int], heartbeats: Mapping[int, Heartbeat]) -> str:
    names = [
        f"rank {r}" + (f" on {heartbeats[r].host}" if r in heartbeats else "")
        for r in ranks[:MAX_NAMED_RANKS]
    ]
    more = f" and {len(ranks) - MAX_NAMED_RANKS} more" if len(ranks) > MAX_NAMED_RANKS else ""
    return ", ".join(names) + more


def end_process(logs: Path, reason: str) -> NoReturn:
    """Write the reason to ``LOST`` and all threads' stack traces to stderr, then exit."""
    print(f"error: {reason}", file=sys.stderr, flush=True)
    faulthandler.dump_traceback(sys.stderr)
    with suppress(OSError), (logs / LOST).open("x") as file:  # the first rank to notice
        file.write(reason)
    os._exit(EXIT_FAILURE)


def read_lost(logs: Path) -> str:
    """Return the reason that ``end_process`` wrote; empty if it was not called."""
    try:
        return (logs / LOST).read_text()
    except OSError:
        return ""
