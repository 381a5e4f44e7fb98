"""Progress display: live on a terminal, plain lines elsewhere."""

from __future__ import annotations

import fcntl
import io
import os
import struct
import sys
import termios
import threading
from pathlib import Path

import pytest
import torch

from trainer.runtime import console as module
from trainer.runtime.console import Console
from trainer.runtime.phases import Phase


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(module, "TICK", 3600.0)  # the test calls refresh itself


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_a_progress_line_is_printed_after_five_silent_seconds(watch: Clock) -> None:
    out = io.StringIO()
    console = Console(out, io.StringIO())

    def at(seconds: float) -> str:
        watch.now = seconds
        out.truncate(out.seek(0))
        console.refresh()
        return out.getvalue()

    with console.phase("importing libraries"):
        assert at(4.9) == ""
        assert at(5.0) == "importing libraries: 0:05\n"
        assert at(9.9) == ""
        with console.working("scoring", 400) as advance:
            advance(100)
            assert at(15.0) == "scoring: 100/400 rows, about 0:15 left\n"
        console.print("a word")
        assert at(19.0) == ""
    assert at(60.0) == "", "no phase is running"
    with console.phase("connecting ranks"):
        assert at(60.5) == "", "short phases are not shown"
        assert at(61.0) == "connecting ranks: 0:01\n"


def test_bytes_and_unknown_totals(watch: Clock) -> None:
    phase = Phase("loading", 5e6, "bytes", 2.5e6)
    assert phase.progress() == "2.5/5.0 MB, about 0:00 left"
    out = io.StringIO()
    console = Console(out, io.StringIO())
    with console.reading() as read:
        read("a.jsonl", 30_000)
        watch.now = 6.0
        console.refresh()
    with console.downloading("org/name") as update:
        update(1_000_000, 4_000_000)
        watch.now = 12.0  # 6 seconds after the phase began
        console.refresh()
    assert out.getvalue().splitlines() == [
        "reading a.jsonl: 30,000 rows",
        "downloading org/name (4.0 MB)",
        "downloading org/name: 1.0/4.0 MB, about 0:18 left",
    ]


def test_the_first_and_last_step_and_one_every_five_seconds_are_printed(watch: Clock) -> None:
    out = io.StringIO()
    with Console(out, io.StringIO()).training(10, 0) as line:
        for step in range(1, 11):
            line.show(step, 0.5, 1000.0, 61.0)
            watch.now += 2.0
    shown = [text.split()[1] for text in out.getvalue().splitlines()]
    assert shown == ["1/10", "4/10", "7/10", "10/10"]
    assert out.getvalue().startswith("step 1/10  loss 0.5000  1,000 tok/s  ETA 1:01\n")


def test_a_terminal_updates_phases_in_place(watch: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(out, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    console = Console(out, io.StringIO())
    with console.phase("validation [1]", 10) as phase:
        console.refresh()
        assert out.getvalue() == "", "short phases are not shown"
        watch.now, phase.done = 2.0, 5
        console.refresh()
    assert "validation [1]" in out.getvalue()
    assert "5/10 rows" in out.getvalue()


def test_other_ranks_start_no_thread() -> None:
    console = Console(io.StringIO(), io.StringIO(), shown=False)
    with console.phase("loading"):
        assert console._ticker is None


def test_an_answer_is_printed_verbatim_without_other_output() -> None:
    out, err = io.StringIO(), io.StringIO()
    console = Console(err, err, answer=out)
    console.print("loading")
    console.warn("careful")
    text = "[bold]:smile: " + "long " * 60
    console.answer(text)
    assert out.getvalue() == text + "\n"


def test_a_phase_waits_for_the_running_redraw(
    watch: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawing, ended, errors = threading.Event(), threading.Event(), []
    monkeypatch.setattr(module, "QUIET_SECONDS", 0.0)
    console = Console(io.StringIO(), io.StringIO())
    monkeypatch.setattr(type(console._out), "is_terminal", True)

    def draw() -> None:
        try:
            console.refresh()
        except KeyError as error:
            errors.append(error)

    with console.phase("training", 10) as phase:
        console.refresh()
        progress = phase.progress

        def slow_progress() -> str:
            drawing.set()
            ended.wait(0.2)
            return progress()

        monkeypatch.setattr(phase, "progress", slow_progress)
        thread = threading.Thread(target=draw)
        thread.start()
        drawing.wait()
    ended.set()
    thread.join()
    assert not errors, "the task of an ended phase was updated"


def test_lines_of_a_long_phase_become_rare(watch: Clock) -> None:
    out = io.StringIO()
    console = Console(out, io.StringIO())
    with console.phase("importing"):
        for second in range(1, 301):
            watch.now = float(second)
            console.refresh()
    times = [line.split(": ")[1] for line in out.getvalue().splitlines()]
    assert times == ["0:05", "0:10", "0:20", "0:40", "1:20", "2:20", "3:20", "4:20"]


def test_a_slow_step_is_announced_once_and_printed_when_it_ends(watch: Clock) -> None:
    out = io.StringIO()
    console = Console(out, io.StringIO())
    with console.training(10, 3) as line:
        watch.now = 5.0
        console.refresh()
        line.show(4, 0.5, 1000.0, 61.0)
        watch.now = 8.0
        line.show(5, 0.25, 1000.0, 61.0)
        watch.now = 11.0
        console.refresh()
        watch.now = 22.0
        console.refresh()
    assert [text.split("  ")[0] for text in out.getvalue().splitlines()] == [
        "step 4/10 is running",
        "step 4/10",
        "step 5/10",
        "step 6/10 is running",
    ]


def test_details_are_printed_only_when_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = io.StringIO()
    console = Console(out, io.StringIO(), tmp_path / "rank-0.log")
    console.detail("packed batches of up to 1,536 tokens")
    assert out.getvalue() == ""
    assert capsys.readouterr().err == "packed batches of up to 1,536 tokens\n", "the log"
    console.verbose = True
    console.detail("packed batches of up to 1,536 tokens")
    assert out.getvalue() == "packed batches of up to 1,536 tokens\n"


def test_gpu_memory_that_ran_out_is_reported_with_a_remedy() -> None:
    err = io.StringIO()
    error = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 22.19 GiB "
        "of which 8.50 MiB is free. Process 77 has 22.18 GiB memory in use. Of the allocated "
        "memory 21.6 GiB is allocated by PyTorch."
    )
    Console(io.StringIO(), err).failure(error)
    assert err.getvalue() == (
        "error: OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB; use more GPUs, "
        "so that each holds less of the base, or end other programs that use this one\n"
    )


def test_output_of_libraries_does_not_appear_on_the_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """While a progress bar is drawn; the standard streams of a rank are its log."""
    monkeypatch.setattr(module, "QUIET_SECONDS", 0.0)
    terminal = io.StringIO()
    console = Console(terminal, terminal)
    monkeypatch.setattr(type(console._out), "is_terminal", True)
    with console.phase("training", 10):
        console.refresh()
        print("deprecated", file=sys.stderr)
    assert "deprecated" not in terminal.getvalue()
    assert "deprecated" in capsys.readouterr().err


def test_the_width_is_that_of_the_console_s_own_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    leader, follower = os.openpty()
    with os.fdopen(leader, "rb"), os.fdopen(follower, "w") as out:
        for columns in (97, 143):
            fcntl.ioctl(out, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
            assert Console(out, io.StringIO()).width == columns
    assert Console(io.StringIO(), io.StringIO()).width == module.PLAIN_WIDTH


def test_a_terminal_of_unknown_size_has_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    leader, follower = os.openpty()  # 0 by 0
    with os.fdopen(leader), os.fdopen(follower, "w") as out:
        console = Console(out, out)
        assert console.is_terminal
        assert console.width == 80
        console.paragraph("step 10  " + "a word " * 30, indent=9)
