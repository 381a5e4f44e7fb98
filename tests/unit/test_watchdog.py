"""The watchdog of a rank, over ranks that are threads and a store that is a dict."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from trainer.distributed import collectives, watchdog
from trainer.distributed.watchdog import CollectiveTracker, Watchdog, end_process, read_lost

BEAT = 0.01


class Shared(dict[str, str]):
    """The store; ``free`` lets whoever asks have an answer, ``gone`` ends it with rank 0."""

    gone = False

    def __init__(self) -> None:
        super().__init__()
        self.free = threading.Event()
        self.free.set()

    def set(self, key: str, value: str) -> None:
        self[key] = value

    def multi_get(self, keys: list[str]) -> list[bytes]:
        self.free.wait(10)
        if self.gone:
            raise ConnectionError("reset by peer")
        return [self[key].encode() for key in keys]


class Ranks:
    def __init__(
        self, count: int = 3, silence: float = 0.3, timeout: float = 60.0, quiet: float = 3 * BEAT
    ) -> None:
        self.store, self.trackers = Shared(), [CollectiveTracker() for _ in range(count)]
        self.messages: list[tuple[int, str]] = []
        self.dogs = [
            Watchdog(
                tracker,
                self.store,
                rank,
                count,
                f"host{rank}",
                silence_seconds=silence,
                timeout_seconds=timeout,
                abort=self._hear(rank),
                heartbeat_seconds=BEAT,
                idle_seconds=quiet,
            )
            for rank, tracker in enumerate(self.trackers)
        ]

    def _hear(self, rank: int) -> Callable[[str], None]:
        def hear(words: str) -> None:
            self.messages.append((rank, words))

        return hear

    def start(self, *ranks: int) -> None:
        for rank in ranks:
            self.dogs[rank].start()

    def until_told_by(self, rank: int) -> None:
        deadline = time.monotonic() + 10
        while rank not in dict(self.messages):
            assert time.monotonic() < deadline, self.messages
            time.sleep(BEAT)

    def end(self) -> None:
        self.store.free.set()
        for dog in self.dogs:
            dog.stop()


@pytest.fixture
def ranks():
    made: list[Ranks] = []

    def make(**settings: float) -> Ranks:
        made.append(Ranks(**settings))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for each in made:
        each.end()


@pytest.mark.fault("rank suspended (SIGSTOP)")
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_rank_without_heartbeats_is_named_with_step_and_collective(ranks, stopped):
    run = ranks()
    run.start(1 - stopped, 2)  # the third has left one beat: as if it had been stopped then
    tracker = run.trackers[1 - stopped]
    with tracker.training_step(7), tracker.during("all_reduce of sums"):
        run.until_told_by(1 - stopped)
    words = dict(run.messages)[1 - stopped]
    assert words.startswith(f"rank {stopped} on host{stopped} stopped responding 0.3 s ago")
    assert "is waiting in all_reduce of sums (step 7, collective 1 of the step)" in words


def test_a_suspended_rank_0_is_named(ranks):
    run = ranks(count=2)
    run.store.free.clear()
    run.start(1)
    run.until_told_by(1)
    assert "rank 0 stopped responding" in run.messages[0][1]


def test_rank_0_that_was_killed_on_another_host_is_named(ranks):
    """Nobody ends ranks of other hosts; a store that does not answer is a sign, too."""
    run = ranks()
    run.start(1, 2)
    run.store.gone = True
    with run.trackers[1].during("all_reduce of sums"):
        run.until_told_by(1)
    assert re.match(r"rank 0( on host0)? stopped responding 0.3 s", dict(run.messages)[1])


def test_ranks_that_are_done_wait_for_rank_0(ranks):
    """srun kills the task of rank 0 some time after the first other task has ended."""
    run, ended = ranks(count=2), threading.Event()
    ended_rank = collectives.Ranks(1, 2, 0, torch.device("cpu"), 60)
    ended_rank._watchdog = run.dogs[1]

    def wait() -> None:
        ended_rank.wait_for_main()
        ended.set()

    threading.Thread(target=wait, daemon=True).start()
    assert not ended.wait(20 * BEAT)
    run.dogs[0].stop()
    assert ended.wait(10)


@pytest.mark.parametrize("how", ["killed", "slow"])
def test_ranks_that_are_done_do_not_wait_for_ever(ranks, how):
    run = ranks(count=2, timeout=0.1)
    run.store.gone = how == "killed"
    run.dogs[1].wait_for_rank_0()


@pytest.mark.fault("rank suspended (SIGSTOP)")
def test_a_responding_rank_that_misses_the_collective_is_named(ranks):
    run = ranks(timeout=0.3, silence=60.0)
    for tracker in run.trackers:
        tracker.step = 3
        tracker.begin("all_gather of base weights")
    run.start(0, 1, 2)
    with run.trackers[0].during("all_reduce of sums"), run.trackers[2].during("all_reduce of sums"):
        run.until_told_by(0)
    assert "rank 1 on host1 hangs after all_gather of base weights (step 3, " in run.messages[0][1]
    assert 1 not in [rank for rank, _ in run.messages], "it waits for nobody"


def test_if_no_rank_is_late_the_network_is_blamed(ranks):
    run = ranks(count=2, timeout=0.3, silence=60.0)
    run.start(0, 1)
    with run.trackers[0].during("all_reduce of sums"), run.trackers[1].during("all_reduce of sums"):
        run.until_told_by(0)
    assert "neither did the others: the network" in run.messages[0][1]


def test_a_rank_without_news_of_others_blames_the_network(ranks):
    run = ranks(count=2, timeout=0.3, silence=60.0)
    run.store.free.clear()
    run.start(1)
    with run.trackers[1].during("all_reduce of sums"):
        run.until_told_by(1)
    assert "no other rank responds: the network" in run.messages[0][1]


def test_slow_busy_and_finished_ranks_are_not_ended(ranks):
    run = ranks(silence=0.3, timeout=0.3)
    run.dogs[2].stop()
    run.start(0, 1)
    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline:  # rank 0 comes slowly; rank 1 works on without the others
        with run.trackers[0].during("all_reduce of status flags"):
            time.sleep(0.1)
    assert run.messages == []


def test_a_job_suspended_together_reports_no_hanging_rank(ranks, monkeypatch):
    """A clock that leaps while nobody beats makes no difference: turns are counted."""
    run = ranks(count=2)
    leap = iter(range(0, 10**9, 10**4))
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: float(next(leap)))
    run.start(0, 1)
    with run.trackers[0].during("all_reduce of status flags"):
        threading.Event().wait(0.6)
    assert run.messages == []


def test_a_step_may_take_many_times_as_long_as_the_slowest_so_far(ranks):
    run = ranks(count=2, silence=0.01, timeout=60.0)
    tracker, dog = run.trackers[0], run.dogs[0]
    with tracker.training_step(1):  # the first compiles
        assert dog._max_idle_seconds() == 60.0
    assert dog._max_idle_seconds() == float("inf"), "between steps, without a collective"
    with tracker.training_step(2):
        time.sleep(0.05)
    assert tracker.slowest is not None
    assert tracker.slowest >= 0.05
    with tracker.training_step(3):
        assert dog._max_idle_seconds() == pytest.approx(watchdog.MAX_SLOWDOWN * tracker.slowest)
    tracker.slowest = 1000.0
    with tracker.training_step(4):
        assert dog._max_idle_seconds() == 60.0, "never more than the timeout"


def test_other_ranks_are_checked_only_while_this_rank_waits(ranks):
    run = ranks(count=2, quiet=0.2)
    asked: list[int] = []
    fetch = run.store.multi_get
    run.store.multi_get = lambda keys: asked.append(1) or fetch(keys)
    run.start(0)
    deadline = time.monotonic() + 0.5
    while time.monotonic() < deadline:
        run.trackers[0].begin("all_gather of base weights")
        time.sleep(0.01)
    assert not asked
    time.sleep(0.4)
    assert asked
    assert json.loads(run.store["promptshard/beat/0"])["number"] > 10, "but it beats all the time"


def test_the_first_message_is_kept_and_the_process_ends(tmp_path: Path, monkeypatch, capfd):
    codes: list[int] = []
    monkeypatch.setattr(watchdog.os, "_exit", codes.append)
    assert read_lost(tmp_path) == ""
    end_process(tmp_path, "rank 1 hangs")
    end_process(tmp_path, "rank 0 hangs")
    assert codes == [1, 1]
    assert read_lost(tmp_path) == "rank 1 hangs"
    stderr = capfd.readouterr().err
    assert "error: rank 1 hangs" in stderr
    assert "test_watchdog.py" in stderr, "where every thread stood"
