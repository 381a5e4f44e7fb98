"""State that a resumed run continues with, and output folders that are archived, lost or full."""

from __future__ import annotations

import errno
import io
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from tests.one_rank import OneRank
from tests.thread_ranks import on_thread_ranks
from tests.unit.run_folder import checkpoint_state, save_checkpoint, write_inputs
from trainer.checkpointing import checkpoint
from trainer.checkpointing.checkpoint import SavedCheckpoint
from trainer.checkpointing.output_folder import (
    OutputFolder,
    OutputLost,
    ResultsNotWritten,
    archive_earlier_run,
    results_can_be_written_later,
    was_archived,
)
from trainer.checkpointing.resume import (
    apply_choices,
    check_finished_run,
    choice_conditions,
    saved_choices,
)
from trainer.checkpointing.run_lock import Lock, LockLost, acquire
from trainer.checkpointing.saved_state import problem_of, problem_of_encoders
from trainer.config import RunConfig, dump
from trainer.prompts.saved_prompts import source_problems, without_sources
from trainer.reporting.run_description import forget_if_copied, forget_if_other
from trainer.reporting.run_end import finish_sending, tracked_run
from trainer.reporting.summary import finished_summary
from trainer.runtime import atomic_io
from trainer.runtime.console import Console
from trainer.runtime.errors import BadInput
from trainer.runtime.process import ROWS_CHECKED
from trainer.tracking import Finished, MetricsLog, TrackingClient
from trainer.tracking.progress_file import ProgressFile
from trainer.training.initial_bank import copy_rank_0
from trainer.training.progress import TrainingProgress
from trainer.training.task_loading import read_tasks

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


def saved(run: RunConfig, device: str = "H100", world_size: int = 2) -> SavedCheckpoint:
    where = choice_conditions(run, device, world_size)
    return SavedCheckpoint(1, {}, {"chosen": {"where": where, **CHOSEN}}, Path("c"))


def test_auto_settings_keep_their_values() -> None:
    run = config()
    chosen = saved_choices(saved(run), choice_conditions(run, "H100", 2))
    assert chosen is not None
    pinned = apply_choices(run, chosen)
    assert pinned.base.matmul == "int8"
    assert pinned.training.micro_batch_tokens == 777
    assert (pinned.engine.gradient_checkpointing, pinned.engine.shard_group) == (True, 2)
    assert pinned.prompts == run.prompts
    assert run.training.micro_batch_tokens == "auto", "the run file itself stays as it is"


@pytest.mark.parametrize(
    "where",
    [
        choice_conditions(config(), "H100", 4),
        choice_conditions(config(), "A100", 2),
        choice_conditions(config(training={"steps": 8, "micro_batch_tokens": 512}), "H100", 2),
        choice_conditions(config(engine={"base_memory": "24GB"}), "H100", 2),
    ],
)
def test_auto_settings_are_chosen_again_under_other_conditions(where: dict[str, Any]) -> None:
    assert saved_choices(saved(config()), where) is None


class NoSender:
    def start(self) -> None: ...

    def finish(self, seconds: float) -> None: ...


@pytest.mark.parametrize("error", [RuntimeError("broken"), LockLost("another has it")])
def test_a_run_that_lost_its_lock_writes_no_summary(tmp_path: Path, error: Exception) -> None:
    text, sender = io.StringIO(), cast(TrackingClient, NoSender())
    with pytest.raises(type(error)), tracked_run(tmp_path, sender, Console(text, text)):
        raise error
    summary = tmp_path / "summary.json"
    assert str(error) in text.getvalue()
    if isinstance(error, LockLost):
        assert not summary.exists()
    else:
        assert json.loads(summary.read_text()) == {
            "schema_version": 1,
            "status": "failed",
            "error": "broken",
        }


@pytest.mark.parametrize(("uri", "seconds"), [("http://127.0.0.1:1", 26.0), (None, 96.0)])
def test_sending_may_take_longer_for_more_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str | None, seconds: float
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    limits = []

    def finish(timeout_s: float) -> Finished:
        limits.append(timeout_s)
        return Finished(True, "")

    client = TrackingClient(write_inputs(tmp_path), uri)
    monkeypatch.setattr(client, "finish", finish)
    finish_sending(client, Console(io.StringIO(), io.StringIO()))
    assert limits == [seconds]


def test_a_stopped_run_has_time_to_end_the_runs_of_all_its_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else MLflow would show it as running until it is resumed."""
    limits: list[float] = []
    client = TrackingClient(write_inputs(tmp_path))
    monkeypatch.setattr(client, "start", lambda: None)
    monkeypatch.setattr(client, "finish", limits.append)
    console = Console(io.StringIO(), io.StringIO())
    with pytest.raises(KeyboardInterrupt), tracked_run(tmp_path, client, console):
        raise KeyboardInterrupt
    assert limits == [10.75]


def earlier_run(output: Path) -> None:
    (output / "logs").mkdir(parents=True, exist_ok=True)
    for name in ("run.yaml", "tracking.json", "logs/system_metrics.jsonl", "logs/rank-0.log"):
        (output / name).write_text(name)


def test_archiving_moves_the_curves_too(tmp_path: Path) -> None:
    output, text = tmp_path / "out", io.StringIO()
    earlier_run(output)
    archive_earlier_run(output, Console(text, text))
    left = [str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()]
    assert left == ["logs/rank-0.log"], "this start already writes to it"
    aside = tmp_path / "out.1"
    assert (aside / "logs" / "system_metrics.jsonl").read_text() == "logs/system_metrics.jsonl"
    assert (aside / "tracking.json").exists()


def test_a_requeued_job_archives_an_earlier_run_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if it is requeued before it got that far."""
    output, text = tmp_path / "out", io.StringIO()
    earlier_run(output)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert not was_archived(output)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert not was_archived(output)
    archive_earlier_run(output, Console(text, text))
    assert was_archived(output)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")  # two commands in one allocation
    assert not was_archived(output)
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert not was_archived(output)


@pytest.mark.parametrize(
    ("steps", "data", "kept"), [(8, "same", True), (9, "same", False), (8, "corrected", False)]
)
def test_a_run_with_other_settings_or_data_starts_new_curves(
    tmp_path: Path, steps: int, data: str, kept: bool
) -> None:
    earlier_run(tmp_path)
    (tmp_path / "run.yaml").write_text(dump(config()))
    (tmp_path / "datasets.json").write_text("same")
    settings = dump(config(training={"steps": steps}))
    forget_if_other(tmp_path, {"run.yaml": settings, "datasets.json": data})
    assert (tmp_path / "tracking.json").exists() == kept
    assert (tmp_path / "logs" / "system_metrics.jsonl").exists() == kept


def test_a_copy_starts_new_curves_while_the_original_exists(tmp_path: Path) -> None:
    original, copy, moved = (tmp_path / name for name in ("original", "copy", "moved"))
    original.mkdir()
    (original / "run.yaml").write_text(f"output_dir: {original}\n")
    ProgressFile(original).save()
    shutil.copytree(original, copy)
    for folder in (original, copy):
        forget_if_copied(folder)
    assert (original / "tracking.json").exists()
    assert not (copy / "tracking.json").exists()
    original.rename(moved)
    forget_if_copied(moved)
    assert (moved / "tracking.json").exists()


def test_a_finished_run_without_checkpoints_is_not_another_run(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(dump(config()))
    source = {"task": "x", "split": "train", "digest": "0"}
    (tmp_path / "datasets.json").write_text(json.dumps([source]))
    data = {"base.dtype": "float32", "data of x, train": "0"}
    check_finished_run(tmp_path, config(checkpoint={"every": 7}), data)
    with pytest.raises(BadInput) as refused:
        check_finished_run(tmp_path, config(training={"steps": 9}), data)
    assert refused.value.problems[0] == (
        f"training.steps: is 9, but the run in {tmp_path} started with 8"
    )
    with pytest.raises(BadInput, match="data of x, train: is '1', but"):
        check_finished_run(tmp_path, config(), data | {"data of x, train": "1"})


def test_a_resumed_run_does_not_need_initial_prompts() -> None:
    prompts = [
        {"name": "p", "task": "x", "num_virtual_tokens": 2, "init": {"from": "/nowhere"}},
        {"name": "q", "task": "x", "num_virtual_tokens": 2, "init": {"text": "a"}},
    ]
    run = config(prompts=prompts)
    resumed = without_sources(run)
    assert [prompt.init.from_ for prompt in resumed.prompts] == [None, None]
    assert resumed.prompts[1] == run.prompts[1]
    assert list(source_problems(run))
    assert not list(source_problems(resumed))


class OneTensor:
    """A bank of one number, as far as ``copy_rank_0`` reads it."""

    def __init__(self, value: str) -> None:
        self.value = value

    def digest(self) -> str:
        return self.value

    def state_dict(self) -> dict[str, str]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, str]) -> None:
        self.value = state["value"]


@pytest.mark.parametrize("values", [("a", "a"), ("a", "b")])
def test_initializations_that_differ_between_ranks_become_rank_0_s(values: tuple[str, str]) -> None:
    banks = [OneTensor(value) for value in values]
    on_thread_ranks([0, 1], lambda rank: copy_rank_0(rank, banks[rank.rank]))  # type: ignore[arg-type]
    assert [bank.value for bank in banks] == ["a", "a"]


def test_an_interrupted_move_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    for name in (
        "run.yaml",
        "checkpoints/step-1/state",
        "metrics.jsonl",
        "logs/system_metrics.jsonl",
    ):
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        (output / name).write_text(name)
    (tmp_path / "out.1").mkdir()  # not created by this program
    console = Console(io.StringIO(), io.StringIO())
    move, moved = shutil.move, []

    def killed(source: str, target: Path) -> None:
        if len(moved) == 2:
            raise KeyboardInterrupt
        moved.append(move(source, target))

    monkeypatch.setattr(shutil, "move", killed)
    with pytest.raises(KeyboardInterrupt):
        archive_earlier_run(output, console)
    monkeypatch.undo()
    assert (output / "run.yaml").exists()
    archive_earlier_run(output, console)
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {
        "out.2/run.yaml",
        "out.2/checkpoints/step-1/state",
        "out.2/metrics.jsonl",
        "out.2/logs/system_metrics.jsonl",
    }


@pytest.mark.parametrize("checked", [False, True])
def test_notes_about_rows_are_not_printed_twice(
    monkeypatch: pytest.MonkeyPatch, checked: bool
) -> None:
    """``promptshard`` prints them before it starts the ranks."""
    monkeypatch.setattr("trainer.training.task_loading.check_all_targets", lambda *_: None)
    monkeypatch.setattr("trainer.training.task_loading.class_warning", lambda *_: "of a class")
    monkeypatch.delenv(ROWS_CHECKED, raising=False)
    if checked:
        monkeypatch.setenv(ROWS_CHECKED, "1")
    data = SimpleNamespace(
        remarks=["a remark"],
        leaks=[SimpleNamespace(warning="a leak")],
        notes=["a note"],
        warnings=["of tokens"],
    )
    monkeypatch.setattr("trainer.training.task_loading.load_tasks", lambda *_, **__: {"t": data})
    engine: Any = OneRank()
    out, err = io.StringIO(), io.StringIO()
    files: Any = SimpleNamespace(
        tokenizer=None,
        folder=None,
        context_length=0,
        config=SimpleNamespace(vocab_size=0),
        end_ids=(),
        generation=None,
    )
    read_tasks(engine, files, config(), Console(out, err), None)
    assert ("a remark" in out.getvalue()) == (not checked)
    assert ("a leak" in err.getvalue()) == (not checked)
    assert "a note" in out.getvalue()
    assert "of a class" in err.getvalue()
    assert "of tokens" in err.getvalue()


def lost_folder(output: Path) -> tuple[OutputFolder, MetricsLog, Lock]:
    """An output folder with one line in its log."""
    output.mkdir()
    log, lock = MetricsLog(output), acquire(output, print)
    log.log(1, 1, {"train_loss": 1.0}, "p")

    def describe() -> None:
        (output / "run.yaml").write_text("settings")

    describe()
    return OutputFolder(output, log, lock, describe), log, lock


@pytest.mark.parametrize("how", ["deleted", "moved", "emptied", "replaced"])
def test_a_lost_folder_is_written_again_with_the_current_state(tmp_path: Path, how: str) -> None:
    output = tmp_path / "out"
    folder, log, lock = lost_folder(output)
    messages: list[str] = []

    def save() -> None:
        save_checkpoint(output / "checkpoints", 7, {}, checkpoint_state(7, {}), 1)

    folder.check(messages.append, save, lambda: None, now=True)
    if how == "moved":
        output.rename(tmp_path / "elsewhere")
    else:
        shutil.rmtree(output)
        if how != "deleted":
            output.mkdir()
        if how == "replaced":
            (output / "run.yaml").write_text("another run")
    log.log(2, 2, {"train_loss": 2.0}, "p")
    with pytest.raises(OutputLost, match="checkpoint step-00000007 and all metrics were written"):
        folder.check(messages.append, save, lambda: None, now=True)
    lock.release()
    names = sorted(path.name for path in output.iterdir())
    assert names == ["checkpoints", "logs", "metrics.jsonl", "run.yaml"]
    assert (output / "run.yaml").read_text() == "settings"
    assert len((output / "metrics.jsonl").read_text().splitlines()) == 2
    assert messages == []


def test_a_deleted_log_is_written_again_with_a_warning(tmp_path: Path) -> None:
    folder, log, lock = lost_folder(tmp_path / "out")
    messages: list[str] = []
    log.path.unlink()
    folder.check(messages.append, pytest.fail, pytest.fail, now=True)
    lock.release()
    assert messages == [f"{log.path} was deleted or moved; written again with all its lines"]
    assert '"train_loss": 1.0' in log.path.read_text()


def test_a_full_disk_at_the_end_names_the_file_and_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-00000009").mkdir(parents=True)

    def fill(path: Path) -> None:
        with atomic_io.replacing(path):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ResultsNotWritten) as failed, results_can_be_written_later(tmp_path):
        fill(tmp_path / "summary.json")
    text = str(failed.value)
    assert text.startswith(f"{tmp_path}/summary.json: cannot be written (No space left on device)")
    assert "Training is complete. The newest checkpoint is step-00000009. Free space" in text
    assert text.endswith("Rerun the command to resume and write the results")
    (tmp_path / "checkpoints" / "step-00000009").rmdir()
    with pytest.raises(ResultsNotWritten) as failed, results_can_be_written_later(tmp_path):
        fill(tmp_path / "summary.json")
    assert "Training is complete, but no checkpoint was saved. Free space" in str(failed.value)
    assert str(failed.value).endswith("Rerun the command to train again")


GOOD = checkpoint_state(5, {"a": 1}, "p", "q")


def changed(path: str, value: Any) -> dict[str, Any]:
    """A good state with another value at a dotted path; ``...`` removes the key."""
    state: dict[str, Any] = json.loads(json.dumps(GOOD))
    *inner, last = path.split(".")
    place: Any = state
    for key in inner:
        place = place[int(key) if isinstance(place, list) else key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return state


def test_a_good_state_has_no_problem() -> None:
    assert problem_of(5, GOOD) is None
    assert problem_of_encoders(5, GOOD) is None
    full = vars(TrainingProgress(step=5, scores={"p": {"validation_loss": math.nan}}))
    full |= {"train_losses": {"p": (1.5, 2)}, "stopped": {"p": {"step": 1, "reason": "halving"}}}
    assert problem_of(5, json.loads(json.dumps(changed("loop.progress", full)))) is None


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *((key, wrong) for key in GOOD for wrong in (..., None, [], "x", 3)),
        *((f"loop.{key}", wrong) for key in GOOD["loop"] for wrong in (..., None, 3, "x")),
        *((f"chosen.{key}", wrong) for key in GOOD["chosen"] for wrong in (..., None, "", "x")),
        *((f"bank.prompts.p.{key}", ...) for key in GOOD["bank"]["prompts"]["p"]),
        ("bank.prompts", []),
        ("bank.prompts.p.optimizer.updates", -1),
        ("bank.prompts.p.optimizer.scale", "1.0"),
        ("loop.progress.step", 4),
        ("loop.progress.step", "5"),
        ("loop.progress.useful_tokens", -1),
        ("loop.progress.unknown", 1),
        ("loop.progress.scores", {"p": 1.0}),
        ("loop.progress.scores", {"p": {"validation_loss": "low"}}),
        ("loop.progress.baselines", {"t": []}),
        ("loop.progress.stopped", {"p": {"step": 1}}),
        ("loop.progress.train_losses", {"p": [1.0]}),
        ("loop.progress.unjudged", 1),
        ("loop.stopping.p", ...),
        ("loop.stopping.p.waited", "0"),
        ("loop.feed", []),
        ("loop.feed.0.position", -1),
        ("loop.feed.0.ahead", [0.5]),
    ],
)
def test_a_changed_state_is_skipped_for_an_older_one(tmp_path: Path, path: str, value: Any) -> None:
    if path == "chosen.matmul" and isinstance(value, str):
        value = 1
    older = checkpoint_state(4, {"a": 1}, "p", "q")
    save_checkpoint(tmp_path, 4, {}, older, 9)
    save_checkpoint(tmp_path, 5, {}, changed(path, value), 9)
    messages: list[str] = []
    saved = checkpoint.newest(tmp_path, messages.append, problem_of)
    assert saved is not None
    assert saved.step == 4
    (warning,) = messages
    assert "step-00000005: state.json: " in warning


@pytest.mark.parametrize(
    "content",
    ["[]", "null", "{", '{"status": "failed"}', '{"status": "finished"}', "[" * 99_999]
    + [json.dumps({"status": "finished", "steps": 1, "prompts": p}) for p in ([], {}, 1)],
)
def test_a_damaged_summary_is_not_of_a_finished_run(tmp_path: Path, content: str) -> None:
    (tmp_path / "summary.json").write_text(content)
    assert finished_summary(tmp_path) is None
