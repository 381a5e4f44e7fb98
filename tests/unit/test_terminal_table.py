"""The result tables and the next steps that a finished run prints, at several widths."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.cells import cell_len

from tests.unit.run_folder import small_config
from trainer.reporting.summary import RunSummary
from trainer.reporting.terminal_table import shorten, show_results
from trainer.runtime.console import Console

LONG = "“Decide with great care which department of the hospital this patient belongs to.”"
STYLES = re.compile(r"\x1b\[[0-9;]*m")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def name_of(i: int, long: bool = False) -> str:
    return f"triage-lr0.0{i:02d}-len20" + ("-with-a-very-long-name-of-a-sweep" if long else "")


def results(count: int, long: bool = False) -> tuple[Any, RunSummary]:
    """A run of one task; prompt 1 is the best, and halving has stopped the second half."""
    names = [name_of(i, long) for i in range(count)]
    config = small_config("accuracy", [{"name": name, "num_virtual_tokens": 20} for name in names])
    prompts: dict[str, Any] = {}
    for i, name in enumerate(names):
        worse = (i - 1) % count
        prompts[name] = {
            "validation_accuracy": 0.95 - 0.01 * worse,
            "shifted_validation_accuracy": 0.9,
            "validation_macro_f1": 0.93,
            "validation_loss": 0.1 + 0.01 * worse,
            "validation_loss_standard_error": 0.02,
            "num_virtual_tokens": 20,
        }
        if worse > count / 2:
            prompts[name]["stopped"] = {"reason": "halving", "step": 20}
    baselines = {"validation_loss": 1.0, "shifted_validation_accuracy": 0.1}
    task = {
        "rows": {"validation": 60, "shifted_validation": 40},
        "no_prompt": {"validation_accuracy": 0.1, **baselines},
        "hand_written": [{"text": LONG[1:-1], "validation_accuracy": 0.4, **baselines}],
        "majority": {"answer": "cardiac", "train_share": 0.3, "validation_accuracy": 0.3},
    }
    summary = {
        "status": "finished",
        "steps": 40,
        "prompts": prompts,
        "tasks": {"t": task},
        "selected": {"t": {"prompt": name_of(1 % count, long), "why": "best"}},
        "throughput": {"useful_tokens_per_second": 1234.5},
        "time": {"start": 10.0, "training": 30.0, "other": 0.0, "total": 40.0},
    }
    return config, RunSummary.model_validate(summary)


def shown(
    monkeypatch: pytest.MonkeyPatch,
    width: int | None,
    count: int,
    *,
    long: bool = False,
    verbose: bool = False,
) -> list[str]:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(width or 33))  # without a terminal it has no effect
    out = Terminal() if width else io.StringIO()
    console = Console(out, out)
    console.verbose = verbose
    config, summary = results(count, long)
    show_results(summary, config, console)
    return STYLES.sub("", out.getvalue()).splitlines()


def test_a_terminal_of_80_columns(monkeypatch):
    lines = [line.rstrip() for line in shown(monkeypatch, 80, 3)]
    lines[3] = lines[3].replace("─", "-")
    expected = """\
t (60 validation rows, 40 OOD validation rows)
  prompt                           tokens   accuracy     loss            stopped
--------------------------------------------------------------------------------
* triage-lr0.001-len20                 20      95.0%   0.1000
  triage-lr0.002-len20                 20      94.0%   0.1100
  triage-lr0.000-len20                 20      93.0%   0.1200   step 20, halving

* baseline: “Decide with great…”               40.0%   1.0000
  baseline: always "cardiac"                   30.0%        –
  baseline: no prompt                          10.0%   1.0000
* best prompt, best baseline"""
    assert lines[1:12] == expected.splitlines()


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize("count", [1, 2, 12, 32, 64])
@pytest.mark.parametrize("width", [40, 80, 120, 200, None])
def test_every_row_is_one_line_and_the_best_is_first(monkeypatch, width, count, long):
    lines = shown(monkeypatch, width, count, long=long)
    start = next(i for i, line in enumerate(lines) if line.startswith("  prompt"))
    end = next(i for i, line in enumerate(lines) if line == "* best prompt, best baseline")
    table = lines[start:end]
    if width:
        assert max(cell_len(line) for line in table if "more prompts" not in line) <= width
    prompts = [line for line in table if re.match(r"[* ] triage", line)]
    assert len(prompts) == (count if count <= 15 else 10)
    assert [line.startswith("* ") for line in prompts] == [True] + [False] * (len(prompts) - 1)
    baselines = [line for line in table if re.match(r"[* ] baseline", line)]
    assert [line[0] for line in baselines] == ["*", " ", " "]
    assert table.index(baselines[0]) > table.index(prompts[-1])
    if width is None or width == 200 or (not long and width >= 80):
        wanted = [name_of((i + 1) % count, long) for i in range(len(prompts))]
        assert [line[2:].split()[0] for line in prompts] == wanted, "names are complete"
    more = [line for line in table if "more prompts" in line]
    assert len(more) == (count > 15)
    if more:
        assert f"{count - 10} more prompts rank lower" in more[0]
        assert "see run/report.html, or repeat with --verbose" in more[0]


def test_verbose_shows_all_prompts(monkeypatch):
    lines = shown(monkeypatch, 120, 64, verbose=True)
    assert sum("triage-lr0.0" in line for line in lines if "  20  " in line) == 64
    assert not any("more prompts" in line for line in lines)


def test_a_narrow_terminal_has_fewer_scores(monkeypatch):
    header = {
        width: next(line for line in shown(monkeypatch, width, 12) if line.startswith("  prompt"))
        for width in (60, 80, 100, 200)
    }
    titles = {width: re.split(r"\s{2,}", line.strip()) for width, line in header.items()}
    ood, f1 = "OOD accuracy", "macro F1"
    assert titles[60] == ["prompt", "tokens", "accuracy"]
    assert titles[80] == ["prompt", "tokens", "accuracy", "loss", "stopped"]
    assert titles[200] == ["prompt", "tokens", "accuracy", ood, f1, "loss", "stopped"]
    assert any("(86.3–98.3)" in line for line in shown(monkeypatch, 200, 12))
    assert not any("(86.3–98.3)" in line for line in shown(monkeypatch, 80, 12)[:-10])


def test_the_end_says_what_to_do_next_in_few_lines(monkeypatch):
    lines = shown(monkeypatch, None, 12)
    assert lines[-4:] == [
        "40 steps, 1,234 useful tokens/s",
        "seconds by phase: 0:40 = start 0:10 (25%) + training 0:30 (75%)",
        "report:  run/report.html (adapters in prompts/, answers in predictions/)",
        f'try it:  promptshard generate run --prompt {name_of(1)} --input "..."',
    ]


def test_a_task_without_validation_has_a_table_without_scores():
    config = small_config("accuracy", [{"name": "a"}, {"name": "b"}])
    prompts = {"a": {}, "b": {"stopped": {"step": 3, "reason": "diverged"}}}
    summary = {"status": "finished", "steps": 4, "prompts": prompts}
    console = Console(out := io.StringIO(), err := io.StringIO())
    show_results(RunSummary.model_validate(summary), config, console)
    table = [line.split() for line in out.getvalue().splitlines()[2:6]]
    assert table[0] == ["prompt", "tokens", "stopped"]
    assert table[2:] == [["a", "20"], ["b", "20", "step", "3,", "diverged"]]
    assert err.getvalue() == "warning: diverged and stopped early: b; lower learning_rate\n"


@pytest.mark.parametrize("text", ["short", "a-rather-long-name-of-a-prompt-lr0.1", "語" * 30])
@pytest.mark.parametrize("width", [12, 13, 20])
@pytest.mark.parametrize("tail", [1, 5])
def test_a_shortened_name_fits(text, width, tail):
    short = shorten(text, width, tail)
    assert cell_len(short) <= width
    assert (short == text) == (cell_len(text) <= width)
    if short != text:
        assert text.startswith(short.split("…")[0].rstrip())
        assert text.endswith(short.split("…")[1])
