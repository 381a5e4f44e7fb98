"""What a resumed run takes over from the one before, and what one leaves alone that has lost it."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trainer.checkpoint import Saved
from trainer.config import RunConfig, dump
from trainer.console import Console
from trainer.lock import LockLost
from trainer.process import ROWS_CHECKED
from trainer.prompts.source import source_problems, without_sources
from trainer.results import forget_if_other
from trainer.resume import as_chosen, chosen_before, put_aside, was_put_aside, where_of
from trainer.run import _begin_alike, _read_tasks, _tracked

CHOSEN = {
    "matmul": "int8",
    "shard_group": 2,
    "kept_bytes": 5,
    "stream_tokens": 777,
    "ramp": [0.5],
    "gradient_checkpointing": True,
}


def config(**sections: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "output_dir": "out",
            "base": {"model": "m"},
            "tasks": [{"name": "x", "train": "x.jsonl", "input": "{a}", "target": "{b}"}],
            "prompts": [{"name": "p", "task": "x", "num_virtual_tokens": 2}],
            "training": {"steps": 8},
            **sections,
        }
    )


def saved(run: RunConfig, device: str = "H100", world_size: int = 2) -> Saved:
    where = where_of(run, device, world_size)
    return Saved(1, {}, {"chosen": {"where": where, **CHOSEN}}, Path("c"))


def test_autos_are_what_they_were() -> None:
    run = config()
    chosen = chosen_before(saved(run), where_of(run, "H100", 2))
    assert chosen is not None
    pinned = as_chosen(run, chosen)
    assert pinned.base.matmul == "int8"
    assert pinned.training.micro_batch_tokens == 777
    assert (pinned.engine.gradient_checkpointing, pinned.engine.shard_group) == (True, 2)
    assert pinned.prompts == run.prompts
    assert run.training.micro_batch_tokens == "auto", "the run file itself stays as it is"


@pytest.mark.parametrize(
    "where",
    [
        where_of(config(), "H100", 4),
        where_of(config(), "A100", 2),
        where_of(config(training={"steps": 8, "micro_batch_tokens": 512}), "H100", 2),
        where_of(config(engine={"base_memory": "24GB"}), "H100", 2),
    ],
)
def test_they_are_found_anew_elsewhere(where: dict[str, Any]) -> None:
    assert chosen_before(saved(config()), where) is None


class NoSender:
    def __init__(self, *_: Any) -> None: ...

    def start(self) -> None: ...

    def finish(self, seconds: float) -> None: ...


@pytest.mark.parametrize("error", [RuntimeError("broken"), LockLost("another has it")])
def test_who_has_lost_the_folder_writes_no_more_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr("trainer.run.Sender", NoSender)
    said = io.StringIO()
    with pytest.raises(type(error)), _tracked(tmp_path, None, Console(said, said)):
        raise error
    summary = tmp_path / "summary.json"
    assert str(error) in said.getvalue()
    if isinstance(error, LockLost):
        assert not summary.exists()
    else:
        assert json.loads(summary.read_text()) == {"status": "failed", "error": "broken"}


def earlier_run(output: Path) -> None:
    (output / "logs").mkdir(parents=True, exist_ok=True)
    for name in ("run.yaml", "tracking.json", "logs/system_metrics.jsonl", "logs/rank-0.log"):
        (output / name).write_text(name)


def test_what_is_put_aside_leaves_no_curves_behind(tmp_path: Path) -> None:
    output, said = tmp_path / "out", io.StringIO()
    earlier_run(output)
    put_aside(output, Console(said, said))
    left = [str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()]
    assert left == ["logs/rank-0.log"], "this very start writes to it"
    aside = tmp_path / "out.1"
    assert (aside / "logs" / "system_metrics.jsonl").read_text() == "logs/system_metrics.jsonl"
    assert (aside / "tracking.json").exists()


def test_a_requeued_job_puts_an_earlier_run_aside_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one that was requeued before it came to that, does it then."""
    output, said = tmp_path / "out", io.StringIO()
    earlier_run(output)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert not was_put_aside(output)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert not was_put_aside(output)
    put_aside(output, Console(said, said))
    assert was_put_aside(output)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")  # two commands in one allocation
    assert not was_put_aside(output)
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert not was_put_aside(output)


def test_a_run_that_begins_anew_with_other_settings_has_curves_of_its_own(tmp_path: Path) -> None:
    for settings, kept in ((config(), True), (config(training={"steps": 9}), False)):
        earlier_run(tmp_path)
        (tmp_path / "run.yaml").write_text(dump(config()))
        forget_if_other(tmp_path, dump(settings))
        assert (tmp_path / "tracking.json").exists() == kept
        assert (tmp_path / "logs" / "system_metrics.jsonl").exists() == kept


def test_what_prompts_started_from_may_be_gone_when_a_run_goes_on() -> None:
    prompts = [
        {"name": "p", "task": "x", "num_virtual_tokens": 2, "init": {"from": "/nowhere"}},
        {"name": "q", "task": "x", "num_virtual_tokens": 2, "init": {"text": "a"}},
    ]
    run = config(prompts=prompts)
    going_on = without_sources(run)
    assert [prompt.init.from_ for prompt in going_on.prompts] == [None, None]
    assert going_on.prompts[1] == run.prompts[1]
    assert list(source_problems(run))
    assert not list(source_problems(going_on))


def test_ranks_that_solved_for_other_last_bits_begin_with_rank_0_s() -> None:
    loaded: list[Any] = []
    state = {"tensors": 1}, {"meta": 2}
    bank = SimpleNamespace(
        digest=lambda: "mine", state=lambda: state, load_state=lambda *given: loaded.append(given)
    )
    for digests, expected in ((["a", "a"], []), (["a", "b"], [state])):
        engine = SimpleNamespace(all_gather=lambda _, d=digests: d, of_main=lambda work: work())
        _begin_alike(engine, bank)  # type: ignore[arg-type]
        assert loaded == expected


def test_a_move_that_was_killed_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    for name in (
        "run.yaml",
        "checkpoints/step-1/state",
        "metrics.jsonl",
        "logs/system_metrics.jsonl",
    ):
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text(name)
    (tmp_path / "out.1").mkdir()  # of a person's own
    console = Console(io.StringIO(), io.StringIO())
    move, moved = shutil.move, []

    def killed(source: str, target: Path) -> None:
        if len(moved) == 2:
            raise KeyboardInterrupt
        moved.append(move(source, target))

    monkeypatch.setattr(shutil, "move", killed)
    with pytest.raises(KeyboardInterrupt):
        put_aside(output, console)
    monkeypatch.undo()
    assert (output / "run.yaml").exists()
    put_aside(output, console)
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {
        "out.2/run.yaml",
        "out.2/checkpoints/step-1/state",
        "out.2/metrics.jsonl",
        "out.2/logs/system_metrics.jsonl",
    }


@pytest.mark.parametrize("checked", [False, True])
def test_notes_about_rows_are_not_printed_twice(
    monkeypatch: pytest.MonkeyPatch, checked: bool
) -> None:
    """``promptshard`` has printed them before it started the ranks."""
    monkeypatch.setattr("trainer.run._check_ends", lambda *_: None)
    monkeypatch.delenv(ROWS_CHECKED, raising=False)
    if checked:
        monkeypatch.setenv(ROWS_CHECKED, "1")
    data = SimpleNamespace(
        remarks=["a remark"], leaks=[SimpleNamespace(warning="a leak")], warnings=["of tokens"]
    )
    engine: Any = SimpleNamespace(
        load_once_per_node=lambda _: {"t": data}, together=lambda call: call()
    )
    out, err = io.StringIO(), io.StringIO()
    files: Any = SimpleNamespace(tokenizer=None, context_length=0, config=None)
    _read_tasks(engine, files, config(), Console(out, err), None)
    assert ("a remark" in out.getvalue()) == (not checked)
    assert ("a leak" in err.getvalue()) == (not checked)
    assert "of tokens" in err.getvalue()
