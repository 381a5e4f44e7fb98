from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.unit.run_folder import PROMPTS, finished_run
from trainer import runfile
from trainer.errors import BadInput
from trainer.redact import redact, secrets_of
from trainer.tracking import MetricsLog, check_uri
from trainer.tracking.folder import Folder, shorten
from trainer.tracking.metrics_log import METRICS_FILE, read_lines
from trainer.tracking.target import resolve

SECRET = "hunter2-secret"


def steps(folder: Path) -> list[int]:
    return [line.step for line, _ in read_lines(folder / METRICS_FILE) if line is not None]


def test_one_json_object_a_line_that_strict_readers_take(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.log(1, 2048, {"train_loss": 0.5, "skipped_updates": 2}, prompt="triage")
    log.log(1, 2048, {"a": math.nan, "b": math.inf, "c": -math.inf})
    raw = (tmp_path / METRICS_FILE).read_text().splitlines()

    def refuse(name: str) -> None:
        raise AssertionError(name)

    first, second = (json.loads(line, parse_constant=refuse) for line in raw)
    assert first["metrics"] == {"train_loss": 0.5, "skipped_updates": 2}
    assert (first["step"], first["useful_tokens"], first["prompt"]) == (1, 2048, "triage")
    assert second["prompt"] is None
    lines = [line for line, _ in read_lines(tmp_path / METRICS_FILE)]
    assert lines[1] is not None
    assert math.isnan(lines[1].metrics["a"])
    assert lines[1].metrics["c"] == -math.inf


def test_rewind_drops_later_steps_and_goes_on(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    for step in range(1, 6):
        log.log(step, step, {"x": step})
    log.rewind(3)
    log.log(4, 4, {"x": 4.0})
    assert steps(tmp_path) == [1, 2, 3, 4]


def test_half_a_line_of_a_crash_is_not_read_and_then_cut(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.log(1, 1, {"x": 1.0})
    log.close()
    with (tmp_path / METRICS_FILE).open("ab") as file:
        file.write(b'{"time": 1, "step": 2, "met')
    assert steps(tmp_path) == [1]
    again = MetricsLog(tmp_path)
    again.log(2, 2, {"x": 2.0})
    assert steps(tmp_path) == [1, 2]


def test_reading_goes_on_at_an_offset_and_passes_over_garbage(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.log(1, 1, {"x": 1.0})
    (_, end), *_ = read_lines(tmp_path / METRICS_FILE)
    with (tmp_path / METRICS_FILE).open("ab") as file:
        file.write(b'garbage\n{"step": 1}\n')
    log.log(2, 2, {"x": 2.0})
    found = [line for line, _ in read_lines(tmp_path / METRICS_FILE, end)]
    assert [line and line.step for line in found] == [None, None, 2]


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        (f"http://me:{SECRET}@host:5000/x", "http://***@host:5000/x"),
        (f"at https://{SECRET}@host, then", "at https://***@host, then"),
        (f"postgresql+psycopg2://me:a/{SECRET}@db/x", "postgresql+psycopg2://***@db/x"),
        (f"http://me:p@{SECRET}@host/x", "http://***@host/x"),
        (f"http://host/?access_token={SECRET}&n=1", "http://host/?access_token=***&n=1"),
        (f"say {SECRET}", "say ***"),
        ("http://host:5000/x sqlite:////tmp/a.db", "http://host:5000/x sqlite:////tmp/a.db"),
    ],
)
def test_credentials_are_hidden(text: str, hidden: str) -> None:
    assert redact(text, [SECRET]) == hidden


def test_secrets_are_known_decoded_too() -> None:
    assert secrets_of("http://me:a%2Fbcd@host/?token=wxyz") == ["a%2Fbcd", "a/bcd", "wxyz"]


@pytest.mark.parametrize("uri", ["runs/mlruns", "file:///x", "htp://host", "http://"])
def test_addresses_that_mlflow_cannot_use_are_refused(uri: str) -> None:
    with pytest.raises(BadInput, match=r"tracking\.uri"):
        check_uri(uri)


def test_where_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    own = resolve(tmp_path, None)
    assert own.uri == f"sqlite:///{tmp_path}/mlflow.db"
    assert own.artifacts == (tmp_path / "mlartifacts").as_uri()
    server = resolve(tmp_path, f"http://me:{SECRET}@host:5000/")
    assert (server.uri, server.name) == ("http://host:5000", "http://host:5000")
    assert server.credentials["MLFLOW_TRACKING_PASSWORD"] == SECRET
    assert SECRET not in repr(server)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{SECRET}@host:5000")
    assert resolve(tmp_path, None).name == "http://host:5000"
    # The run file's own copy has the credentials hidden; the environment's come to its help.
    again = resolve(tmp_path, "http://***@host:5000")
    assert again.credentials["MLFLOW_TRACKING_USERNAME"] == "me"
    assert resolve(tmp_path, "http://***@elsewhere").credentials == {}
    with pytest.raises(BadInput, match="MLFLOW_TRACKING_URI"):
        resolve(tmp_path, "postgresql://***@db/x")


def test_what_mlflow_is_told(tmp_path: Path) -> None:
    folder = Folder(finished_run(tmp_path / "support"))
    params = folder.params()
    assert params["base.quantization"] == "int8"
    assert params["tasks.triage.metric"] == "accuracy"
    assert params["world_size"] == "2"
    assert not any(key.startswith(("prompts", "tracking")) for key in params)
    prompt = folder.prompt_params(folder.prompts[1])
    assert prompt["encoder"] == "mlp"
    assert prompt["seed"] == "0"
    assert prompt["init"].startswith("text: Decide")
    assert folder.prompt_tags(folder.prompts[0])["task"] == "triage"
    step, scores = folder.final_metrics(folder.prompts[0], folder.summary())
    assert step == 120
    assert scores["validation_accuracy_best"] == PROMPTS["triage"][-1]
    assert scores["validation_accuracy_no_prompt"] == 0.34
    assert scores["validation_accuracy_hand_written"] == 0.69
    assert "validation_loss_hand_written" not in scores  # the task is judged by accuracy
    note = folder.note(folder.summary())
    assert "| **triage** (20 virtual tokens), best prompt | 94.0% |" in note


def test_long_values_are_cut_and_say_so() -> None:
    text = shorten("x" * 10000, 6000)
    assert len(text) == 6000
    assert "10000 characters" in text


def test_the_summary_of_an_earlier_session_does_not_count(tmp_path: Path) -> None:
    folder = Folder(finished_run(tmp_path))
    assert folder.summary()["status"] == "finished"
    assert folder.summary((tmp_path / "summary.json").stat().st_mtime_ns) == {}


def test_the_run_file_is_parsed_once_until_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every prompt asks for it, and parsing takes as long as it has prompts."""
    folder, parsed = Folder(finished_run(tmp_path)), []
    real = runfile.saved
    monkeypatch.setattr(runfile, "saved", lambda path: parsed.append(path) or real(path))
    summary = folder.summary()
    for prompt in folder.prompts:
        folder.prompt_params(prompt)
        folder.prompt_tags(prompt)
        folder.final_metrics(prompt, summary)
    assert len(parsed) == 1
    path = tmp_path / "run.yaml"
    path.write_text(path.read_text().replace("examples/tiny_base", "another"))
    assert folder.params()["base.model"] == "another"
    path.unlink()
    assert folder.params().keys().isdisjoint({"base.model"})
