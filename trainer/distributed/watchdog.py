"""Detect ranks that hang: which one, at which step and in which collective. Imports no library.

A collective waits for every rank, so one suspended rank stops all of them without a message. Each
rank has two threads against that: one writes heartbeats of this rank to the store and, once the
main thread has made no progress for a while, reads those of the others; the other thread judges.
They are separate because rank 0 holds the store: if it hangs, every read hangs too.

Time is counted in iterations of the judging thread, not by a clock: in a job that is suspended as a
whole, and resumed later, no rank hangs.
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
from typing import NoReturn, Protocol

from trainer.runtime.errors import EXIT_FAILURE

#: Seconds between two beats of a rank, and between two looks at those of others.
BEAT_SECONDS = 1.0
#: How long the main thread must stand still before anybody looks.
QUIET_SECONDS = 5.0
#: How many times the slowest step so far one may take.
SLOWER = 20
#: In ``logs``: which rank was declared lost, and why. The program that started the ranks prints it.
LOST = "lost.txt"
#: Ranks that a message names one by one.
MOST_NAMED = 4


class KeyValueStore(Protocol):
    """What all ranks can read and write."""

    def set(self, key: str, value: str) -> object: ...

    def multi_get(self, keys: list[str]) -> list[bytes]: ...


@dataclass(frozen=True)
class Heartbeat:
    """A heartbeat.

    Attributes:
        turn: grows with every beat.
        step, count, doing: as in ``CollectiveTracker``.
        left: this rank needs no other any more.
    """

    host: str
    turn: int
    step: int
    count: int
    doing: str
    left: bool = False


class CollectiveTracker:
    """What the main thread of this rank is at.

    Attributes:
        count, doing: collectives begun in this step, or after it until the next, and the last.
        moves: grows with everything that begins or ends.
        slowest: seconds of the slowest step so far but the first, which also compiles.
        waiting: it is within a collective.
    """

    def __init__(self) -> None:
        self.step = self.count = self.moves = 0
        self.doing = "the start"
        self.in_step = self.waiting = False
        self.slowest: float | None = None
        self._steps = 0

    def at(self, what: str) -> None:
        """A collective begins whose end is not seen."""
        self.doing = what
        self.count += 1
        self.moves += 1

    @contextmanager
    def within(self, what: str) -> Iterator[None]:
        """A collective, from its begin to its end."""
        self.at(what)
        self.waiting = True
        try:
            yield
        finally:
            self.waiting = False
            self.moves += 1

    @contextmanager
    def training_step(self, step: int) -> Iterator[None]:
        self.step, self.count, self.in_step = step, 0, True
        self.moves += 1
        started = time.monotonic()
        try:
            yield
        finally:
            self.in_step = False
            self.moves += 1
        self._steps += 1
        if self._steps > 1:
            self.slowest = max(self.slowest or 0.0, time.monotonic() - started)


class Watchdog:
    """Watches over the other ranks while this one stands still.

    Args:
        silence_seconds: how long a rank may be without a beat.
        timeout_seconds: how long this rank waits in a collective outside of steps.
        give_up: is called, in a thread, with what is wrong; it ends this process.
    """

    def __init__(
        self,
        pulse: CollectiveTracker,
        store: KeyValueStore,
        rank: int,
        ranks: int,
        host: str,
        *,
        silence_seconds: float,
        timeout_seconds: float,
        give_up: Callable[[str], object],
        beat_seconds: float = BEAT_SECONDS,
        quiet_seconds: float = QUIET_SECONDS,
    ) -> None:
        self._pulse, self._store, self._host = pulse, store, host
        self._rank, self._keys = rank, [f"promptshard/beat/{r}" for r in range(ranks)]
        self._silence, self._timeout = silence_seconds, timeout_seconds
        self._give_up, self._beat, self._look_after = give_up, beat_seconds, quiet_seconds
        self._over, self._curious = threading.Event(), False
        self._turn = self._answers = 0
        self._seen: list[Heartbeat] = []
        self._send()

    def start(self) -> None:
        """Every rank must have made its watchdog: there is a beat of each from then on."""
        for work in (self._carry, self._judge):
            threading.Thread(target=work, daemon=True, name="watchdog").start()

    def stop(self) -> None:
        """This rank waits for no other any more; the others need not wait for its beats."""
        self._over.set()
        with suppress(Exception):  # rank 0 may have left already
            self._send()

    def _send(self) -> None:
        self._turn += 1
        pulse = self._pulse
        beat = Heartbeat(
            self._host, self._turn, pulse.step, pulse.count, pulse.doing, self._over.is_set()
        )
        self._store.set(self._keys[self._rank], json.dumps(asdict(beat)))

    def _carry(self) -> None:
        while not self._over.wait(self._beat):
            try:
                self._send()
                if self._curious:
                    self._seen = [
                        Heartbeat(**json.loads(b)) for b in self._store.multi_get(self._keys)
                    ]
                    self._answers += 1
            except Exception:  # rank 0 has ended, or its host is cut off: nobody answers
                continue

    def _judge(self) -> None:
        before = -1
        turns: dict[int, int] = {}
        silent: dict[int, float] = {}
        quiet, unanswered, answers = 0.0, 0.0, 0
        while not self._over.wait(self._beat):
            moves = self._pulse.moves
            if moves != before:
                before, quiet, turns, silent = moves, 0.0, {}, {}
                self._curious = False
                continue
            quiet += self._beat
            self._curious = quiet >= self._look_after
            if not self._curious:
                unanswered, answers = 0.0, self._answers
                continue
            if self._answers == answers:
                unanswered += self._beat
            else:
                unanswered, answers = 0.0, self._answers
                for rank, beat in enumerate(self._seen):
                    fresh = beat.left or turns.get(rank) != beat.turn
                    silent[rank] = 0.0 if fresh else silent.get(rank, 0.0) + self._beat
                    turns[rank] = beat.turn
            gone = [r for r, seconds in silent.items() if seconds >= self._silence]
            if unanswered >= self._silence:  # by rank 0, which holds the beats of all
                gone = [0]
            if gone and gone != [self._rank]:
                self._give_up(self._about_silent(gone))
                return
            if quiet >= self._patience():
                self._give_up(self._about_behind(quiet))
                return

    def _patience(self) -> float:
        """How long the main thread may stand still."""
        if self._pulse.in_step and self._pulse.slowest is not None:
            return min(self._timeout, max(2 * self._silence, SLOWER * self._pulse.slowest))
        return self._timeout if self._pulse.waiting or self._pulse.in_step else float("inf")

    def _about_silent(self, gone: Sequence[int]) -> str:
        beats = dict(enumerate(self._seen))
        return (
            f"{_named(gone, beats)} stopped responding {self._silence:g} s ago (process suspended, "
            f"or host lost); rank {self._rank} is waiting for it {self._where()}; aborting"
        )

    def _about_behind(self, seconds: float) -> str:
        """Who has not come as far as others, if anybody has not."""
        beats = {rank: beat for rank, beat in enumerate(self._seen) if not beat.left}
        places = {rank: (beat.step, beat.count) for rank, beat in beats.items()}
        last = [rank for rank, place in places.items() if place == min(places.values())]
        where = f"rank {self._rank} made no progress for {seconds:g} s {self._where()}"
        if not places:
            return f"{where}, and no other rank responds: the network may be down"
        if len(last) == len(places):
            return f"{where}, and neither did the others: the network between them may be down"
        at = beats[last[0]]
        return (
            f"{_named(last, beats)} hangs at step {at.step} after {at.doing} (collective "
            f"{at.count} of the step); {where}"
        )

    def _where(self) -> str:
        pulse = self._pulse
        return f"at step {pulse.step} in {pulse.doing} (collective {pulse.count} of the step)"


def _named(ranks: Sequence[int], beats: Mapping[int, Heartbeat]) -> str:
    names = [
        f"rank {r}" + (f" on {beats[r].host}" if r in beats else "") for r in ranks[:MOST_NAMED]
    ]
    more = f" and {len(ranks) - MOST_NAMED} more" if len(ranks) > MOST_NAMED else ""
    return ", ".join(names) + more


def end_process(logs: Path, words: str) -> NoReturn:
    """Leave word of who was lost, and where every thread stands in this rank's log; then end."""
    print(f"error: {words}", file=sys.stderr, flush=True)
    faulthandler.dump_traceback(sys.stderr)
    with suppress(OSError), (logs / LOST).open("x") as file:  # the first rank to notice
        file.write(words)
    os._exit(EXIT_FAILURE)


def read_lost(logs: Path) -> str:
    """What ``end_process`` left; empty if it was not called."""
    try:
        return (logs / LOST).read_text()
    except OSError:
        return ""
