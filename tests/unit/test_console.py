"""What a person sees of work that takes long."""

from __future__ import annotations

import io

from trainer import console as module
from trainer.console import Console


def test_work_is_shown_once_it_takes_long(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    with Console(out, io.StringIO()).working("tokenising d.jsonl", 3000) as advance:
        advance(1000)
        assert out.getvalue() == "", "quick work is not shown"
        now[0] = 1.5
        advance(1000)
        advance(1000)
    assert out.getvalue() == "tokenising d.jsonl (3,000 rows)\n"


def test_reading_is_shown_where_it_takes_long(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    with Console(out, io.StringIO()).reading() as said:
        said("a.jsonl", 20_000)
        now[0] = 6.0
        said("small.jsonl", 2)
        said("b.jsonl", 30_000)
        said("b.jsonl", 40_000)
        now[0] = 12.0
        said("b.jsonl", 50_000)
    assert out.getvalue() == "reading b.jsonl: 30,000 rows\nreading b.jsonl: 50,000 rows\n"
