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
