from __future__ import annotations

import json
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from tests.unit.run_folder import PROMPTS, finished_run, write_inputs
from trainer import config
from trainer.config.tracking import Tracking
from trainer.reporting.mlflow_note import read_results
from trainer.runtime.errors import BadInput
from trainer.runtime.redact import redact, secrets_of
from trainer.tracking import MetricsLog, TrackingClient, metrics_log
from trainer.tracking.metrics_log import METRICS_FILE, Line, read_lines
from trainer.tracking.progress_file import ProgressFile, StoreProgress, missing_results
from trainer.tracking.refusals import explain
from trainer.tracking.run_metadata import RunMetadata, shorten
from trainer.tracking.store_uri import resolve

SECRET = "hunter2-secret"
LOGIN = ("MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")


class Answer(Exception):
    """As mlflow (``error_code``) or requests (``response``) raise it for a server's answer."""

    def __init__(self, text: str, code: str | None = None, status: int | None = None) -> None:
        super().__init__(text)
        if code is not None:
            self.error_code = code
        if status is not None:
            self.response = SimpleNamespace(status_code=status)


def steps(folder: Path) -> list[int]:
    return [line.step for line, _ in read_lines(folder / METRICS_FILE) if line is not None]


def test_one_json_object_per_line_for_strict_readers(tmp_path: Path) -> None:
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
    assert second["metrics"] == {"a": None, "b": None, "c": None}
    lines = [line for line, _ in read_lines(tmp_path / METRICS_FILE)]
    assert lines[1] is not None
    assert all(map(math.isnan, lines[1].metrics.values()))


def test_strings_of_earlier_versions_are_read(tmp_path: Path) -> None:
    MetricsLog(tmp_path).log(1, 2048, {"a": math.inf, "b": math.nan})
    path = tmp_path / METRICS_FILE
    line = json.loads(path.read_text())
    path.write_text(json.dumps(line | {"metrics": {"a": "-Infinity", "b": "NaN"}}) + "\n")
    ((read, _),) = read_lines(path)
    assert read is not None
    assert read.metrics["a"] == -math.inf
    assert math.isnan(read.metrics["b"])


def test_rewind_drops_later_steps(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    for step in range(1, 6):
        log.log(step, step, {"x": step})
    log.rewind(3)
    log.log(4, 4, {"x": 4.0})
    assert steps(tmp_path) == [1, 2, 3, 4]


def test_rewind_drops_a_validation_that_is_repeated(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    for step in (1, 2):
        log.log(step, step, {"train_loss": step}, "p")
        log.log(step, step, {"validation_loss": step, "generalization_gap": 0.1}, "p")
        log.log(step, step, {"shifted_validation_loss": step}, "p")
    log.rewind(2, validated=False)
    log.log(2, 2, {"validation_loss": 2.0}, "p")
    assert steps(tmp_path) == [1, 1, 1, 2, 2]
    log.rewind(2)
    assert steps(tmp_path) == [1, 1, 1, 2, 2]


def test_rewind_does_not_parse_the_lines_of_earlier_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long run has millions of them."""
    log, parsed, parse = MetricsLog(tmp_path), list[bytes](), metrics_log._parse
    for step in range(1, 6):
        log.log(step, step, {"x": step})

    def count(raw: bytes) -> Line | None:
        parsed.append(raw)
        return parse(raw)

    monkeypatch.setattr(metrics_log, "_parse", count)
    log.rewind(4)
    monkeypatch.undo()
    assert len(parsed) == 2
    assert steps(tmp_path) == [1, 2, 3, 4]


@pytest.mark.parametrize("moved", [False, True])
def test_a_file_that_was_deleted_is_written_again(tmp_path: Path, moved: bool) -> None:
    log = MetricsLog(tmp_path)
    log.log(1, 1, {"x": 1.0})
    assert not log.restore()
    log.path.rename(tmp_path / "moved") if moved else log.path.unlink()
    log.log(2, 2, {"x": 2.0})
    assert log.restore()
    log.log(3, 3, {"x": 3.0})
    assert steps(tmp_path) == [1, 2, 3]
    assert not log.restore()


def test_an_incomplete_line_is_not_read_and_then_cut(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.log(1, 1, {"x": 1.0})
    log.close()
    with (tmp_path / METRICS_FILE).open("ab") as file:
        file.write(b'{"time": 1, "step": 2, "met')
    assert steps(tmp_path) == [1]
    again = MetricsLog(tmp_path)
    again.log(2, 2, {"x": 2.0})
    assert steps(tmp_path) == [1, 2]


def test_reading_continues_at_an_offset_and_skips_damaged_lines(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    log.log(1, 1, {"x": 1.0})
    (_, end), *_ = read_lines(tmp_path / METRICS_FILE)
    with (tmp_path / METRICS_FILE).open("ab") as file:
        file.write(b'garbage\n{"step": 1}\n')
    log.log(2, 2, {"x": 2.0})
    lines = [line for line, _ in read_lines(tmp_path / METRICS_FILE, end)]
    assert [line and line.step for line in lines] == [None, None, 2]


@pytest.mark.parametrize(
    ("text", "hidden"),
    [
        (f"http://me:{SECRET}@host:5000/x", "http://***@host:5000/x"),
        (f"at https://{SECRET}@host, then", "at https://***@host, then"),
        (f"postgresql+psycopg2://me:a/{SECRET}@db/x", "postgresql+psycopg2://***@db/x"),
        (f"http://me:p@{SECRET}@host/x", "http://***@host/x"),
        (f"http://me:a/b@{SECRET}@host/x", "http://***@host/x"),
        (f"http://host/?access_token={SECRET}&n=1", "http://host/?access_token=***&n=1"),
        (f"say {SECRET}", "say ***"),
        ("http://host:5000/x sqlite:////tmp/a.db", "http://host:5000/x sqlite:////tmp/a.db"),
    ],
)
def test_credentials_are_hidden(text: str, hidden: str) -> None:
    assert redact(text, [SECRET]) == hidden


@pytest.mark.fault("secrets in the tracking URI")
def test_decoded_secrets_are_redacted() -> None:
    uri = "http://me:a%2Fbcdef9@host/?token=wxyz12345"
    assert secrets_of(uri) == ["a%2Fbcdef9", "wxyz12345", "a/bcdef9"]


@pytest.mark.parametrize(
    "uri",
    [
        "runs/mlruns",
        "file:///x",
        "htp://host",
        "http://",
        "http://h:port",
        "http://[x",
        "sqlite://",
    ],
)
def test_addresses_that_mlflow_cannot_use_are_refused(uri: str) -> None:
    with pytest.raises(ValidationError, match="use "):
        Tracking(uri=uri)
    with pytest.raises(BadInput, match=r"tracking\.uri: .*use "):
        resolve(Path(), uri)


def test_the_store_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "a b"
    folder.mkdir(parents=True)
    default = resolve(folder)
    assert default.uri == default.name == f"sqlite:///{tmp_path}/mlflow.db"
    assert default.artifacts == (tmp_path / "mlruns").as_uri()
    assert resolve(folder, "sqlite:///x/y.db").uri == f"sqlite:///{tmp_path}/x/y.db"
    server = resolve(folder, f"http://me:{SECRET}@host:5000/")
    assert (server.uri, server.name) == ("http://host:5000", "http://host:5000")
    assert server.credentials["MLFLOW_TRACKING_PASSWORD"] == SECRET
    assert SECRET not in repr(server)
    state = ProgressFile(folder)
    state.store = default.name  # as the sender keeps it
    state.save()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert resolve(folder).uri == default.uri
    (folder / "tracking.json").unlink()
    assert resolve(folder).uri == f"sqlite:///{elsewhere}/mlflow.db"
    (folder / "mlflow.db").touch()  # of a run with its own store
    assert resolve(folder).uri == f"sqlite:///{folder}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{SECRET}@host:5000")
    assert resolve(folder).name == "http://host:5000"
    # The run file's own copy has the credentials hidden; the environment's come to its help.
    again = resolve(folder, saved="http://***@host:5000")
    assert again.credentials["MLFLOW_TRACKING_USERNAME"] == "me"
    assert resolve(folder, saved="http://***@elsewhere").credentials == {}
    with pytest.raises(BadInput, match="MLFLOW_TRACKING_URI"):
        resolve(folder, "postgresql://***@db/x")


@pytest.mark.parametrize(
    ("saved", "environment", "trusted"),
    [
        ("http://host:5000", None, False),
        ("http://host:5000", "http://host:5000/", True),
        ("http://host:5000", "http://HOST:5000/other", True),
        ("http://host", "http://host:80", True),
        ("http://host:5000", "http://host:5001", False),
        ("http://host", "https://host", False),
        ("http://host.evil.example", "http://host", False),
        ("http://host@evil.example", "http://host", False),
    ],
)
def test_credentials_go_only_to_the_server_that_the_environment_names(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    saved: str,
    environment: str | None,
    trusted: bool,
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if environment:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", environment)
    for name in LOGIN:
        monkeypatch.setenv(name, SECRET)
    for target, expected in (
        (resolve(tmp_path, saved=saved), trusted),
        (resolve(tmp_path, saved, saved), True),
    ):
        assert target.trusted is expected
        home = os.environ["HOME"]
        with target.applied():
            assert (SECRET in map(os.environ.get, LOGIN)) is expected
            assert (os.environ["HOME"] == home) is expected  # ~/.mlflow/credentials, ~/.netrc
        assert os.environ["MLFLOW_TRACKING_TOKEN"] == SECRET


def test_a_token_in_the_address_replaces_a_password_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.utils.credentials import get_default_host_creds

    for name in LOGIN:
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setenv("HOME", str(tmp_path))
    with resolve(tmp_path, "http://host?token=of-the-uri").applied():
        sent = get_default_host_creds("http://host")
        assert (sent.username or "", sent.token) == ("", "of-the-uri")


def test_calls_of_mlflow_report_their_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a background thread they would not, and points that were never stored count as sent."""
    monkeypatch.setenv("MLFLOW_ENABLE_ASYNC_LOGGING", "true")
    with resolve(tmp_path, "http://host").applied():
        assert os.environ["MLFLOW_ENABLE_ASYNC_LOGGING"] == "false"


@pytest.mark.parametrize(
    "saved", ["postgresql://db/x", "mysql+pymysql://me@db/x", "sqlite:////nowhere/x.db"]
)
def test_a_database_that_only_the_folder_names_must_be_confirmed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: str
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(BadInput, match=r"run: promptshard sync .* --uri "):
        resolve(tmp_path, saved=saved)
    assert resolve(tmp_path, saved, saved).trusted


@pytest.mark.parametrize("secret", ["test", "training", "12345678", "abc"])
def test_a_common_word_as_password_is_hidden_in_addresses_only(secret: str) -> None:
    uri = f"http://me:{secret}@host/?token={secret}"
    assert secrets_of(uri) == []
    assert secret not in redact(f"uri: {uri}", secrets_of(uri))


def test_results_that_a_killed_run_did_not_write(tmp_path: Path) -> None:
    folder = finished_run(tmp_path / "run")
    assert missing_results(folder) == "report.html"
    state = ProgressFile(folder)
    state.store = "sqlite:////x/mlflow.db"
    state.stores[state.store] = StoreProgress(status="RUNNING")
    state.save()
    assert missing_results(folder) == "report.html and the end of the run in MLflow"
    (folder / "report.html").touch()
    assert missing_results(folder) == "the end of the run in MLflow"
    state.stores[state.store].status = "FINISHED"
    state.save()
    assert missing_results(folder) is None


def test_a_problem_of_the_sender_is_reported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.tracking.process_client.CHECK_SECONDS", 0.0)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    sender, state = TrackingClient(tmp_path), ProgressFile(tmp_path)
    alive = SimpleNamespace(poll=lambda: None)
    monkeypatch.setattr(sender, "_process", alive)
    assert sender.new_problem() is None
    for problem in ("experiment 'x' is deleted", "another"):
        state.problem = problem
        state.save()
        assert (sender.new_problem() or "").startswith(f"MLflow: {problem}. Training continues")
        assert sender.new_problem() is None
        state.save()
        assert sender.new_problem() is None
    alive.poll = lambda: 1
    assert "the sender has ended; reasons are in logs/tracking.log" in (sender.new_problem() or "")
    assert sender.new_problem() is None
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "./mlruns")
    assert "MLFLOW_TRACKING_URI: './mlruns' is a folder" in (sender.new_problem() or "")


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (Answer("no 403 at http://host:4030", "INTERNAL_ERROR"), None),
        (Answer("connect to port 4010 timed out"), None),
        (Answer("no", "UNAUTHENTICATED"), "set MLFLOW_TRACKING_USERNAME"),
        (Answer("no", "PERMISSION_DENIED"), "set MLFLOW_TRACKING_USERNAME"),
        (Answer("403 Client Error", status=403), "set MLFLOW_TRACKING_USERNAME"),
        (Answer("!= 200", "ENDPOINT_NOT_FOUND"), "(http://host:5000/health must answer OK)"),
        (
            Answer("!= 200. Response body: 'Invalid Host header'", "PERMISSION_DENIED"),
            "mlflow server --allowed-hosts host:5000",
        ),
    ],
)
def test_advice_follows_the_http_status(
    tmp_path: Path, error: Exception, remedy: str | None
) -> None:
    text = explain(error, resolve(tmp_path, "http://host:5000"), tmp_path)
    assert text.endswith(remedy if remedy else str(error)) or (remedy or "") in text
    assert ("MLFLOW_TRACKING_USERNAME" in text) is (remedy or "").startswith("set MLFLOW")


def test_only_files_inside_the_folder_are_uploaded(tmp_path: Path) -> None:
    folder = RunMetadata(finished_run(tmp_path / "support"))
    private = tmp_path / "id_rsa"
    private.write_text("private")
    good = {a.key for a in [*folder.early_artifacts(), *folder.late_artifacts()]}
    inside = folder.path / "prompts" / "triage"
    (inside / "leak.txt").symlink_to(private)
    (inside / "notes.txt").write_text("not ours")
    (inside / "README.md").symlink_to(private)
    (folder.path / "prompts" / "animals" / "last").symlink_to(inside, target_is_directory=True)
    (folder.path / "report.html").symlink_to(private)
    os.mkfifo(folder.path / "prompts" / "triage-mlp" / "README.md")
    predictions = folder.path / "predictions"
    predictions.mkdir()
    (predictions / "triage.jsonl").write_text("{}\n")
    (predictions / "leak.jsonl").symlink_to(private)
    keys = {a.key for a in [*folder.early_artifacts(), *folder.late_artifacts()]}
    assert keys == good | {"triage:predictions/triage.jsonl", "triage:table/triage.jsonl"}
    (folder.path / "metrics.jsonl").rename(tmp_path / "m")
    (folder.path / "metrics.jsonl").symlink_to(tmp_path / "m")
    assert list(folder.lines("metrics.jsonl")) == []
    run = folder.settings
    run["prompts"][0]["name"] = "../../prompts/triage"
    (folder.path / "run.yaml").write_text(json.dumps(run))
    folder = RunMetadata(folder.path)
    assert not any(".." in a.key for a in folder.late_artifacts())


@pytest.mark.parametrize(
    "content", ["[]", "1", "null", '"x"', "{", "[" * 100_000, '{"prompts": []}']
)
def test_files_of_the_folder_may_be_damaged(tmp_path: Path, content: str) -> None:
    folder = RunMetadata(write_inputs(tmp_path / "run"))
    for name in ("summary.json", "environment.json", "datasets.json", "tracking.json"):
        (folder.path / name).write_text(content)
    ProgressFile(folder.path)
    folder.params(), folder.tags(), folder.summary(), folder.datasets("triage")
    assert set(read_results(folder.path).prompts) == set(PROMPTS)


@pytest.mark.parametrize(
    "changes",
    [
        {"step": "Infinity"},
        {"step": -1},
        {"step": 2**70},
        {"time": float("nan")},
        {"prompt": []},
        {"metrics": [1]},
        {"metrics": {"loss": []}},
        {"useful_tokens": float("inf")},
    ],
)
def test_damaged_lines_are_left_out(tmp_path: Path, changes: dict[str, Any]) -> None:
    log = MetricsLog(tmp_path)
    log.log(1, 10, {"train_loss": 1.0}, "p")
    log.close()
    good = (tmp_path / METRICS_FILE).read_text()
    bad = json.dumps(json.loads(good) | changes).replace('"Infinity"', "Infinity")
    (tmp_path / METRICS_FILE).write_text(f"{good}{bad}\n{'[' * 100_000}\n{good}")
    assert [line and line.step for line, _ in read_lines(tmp_path / METRICS_FILE)] == [
        1,
        None,
        None,
        1,
    ]


def test_params_tags_and_results(tmp_path: Path) -> None:
    folder = RunMetadata(finished_run(tmp_path / "support"))
    params = folder.params()
    assert params["base.quantization"] == "int8"
    assert params["tasks.triage.metric"] == "accuracy"
    assert params["world_size"] == "2"
    assert not any(key.startswith(("prompts", "tracking")) for key in params)
    prompt = folder.prompt_params(folder.prompts[1])
    assert prompt["encoder"] == "mlp"
    assert (prompt["seed"], prompt["data_seed"], prompt["steps"]) == ("0", "0", "120")
    assert prompt["optimizer"] == "adamw"
    assert prompt["init"].startswith("text: Decide")
    assert folder.prompt_tags(folder.prompts[0])["task"] == "triage"
    results = read_results(folder.path)
    scores = results.prompts["triage"].metrics
    assert results.prompts["triage"].step == 120
    assert results.prompts["triage"].tags == {"stopped": "finished", "selected": "yes"}
    assert scores["validation_accuracy_best"] == PROMPTS["triage"][-1]
    assert scores["validation_accuracy_no_prompt"] == 0.34
    assert scores["validation_accuracy_hand_written"] == 0.69
    assert "validation_loss_hand_written" not in scores  # the task is judged by accuracy
    assert "| **triage** (20 virtual tokens), best prompt | 94.0% |" in results.note


def test_long_values_are_cut_with_a_note() -> None:
    text = shorten("x" * 10000, 6000)
    assert len(text) == 6000
    assert "10000 characters" in text


def test_the_run_file_is_parsed_once_until_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every prompt reads it, and parsing takes longer with more prompts."""
    folder, parsed = RunMetadata(finished_run(tmp_path)), []
    real = config.load
    monkeypatch.setattr(config, "load", lambda path: parsed.append(path) or real(path))
    for prompt in folder.prompts:
        folder.prompt_params(prompt)
        folder.prompt_tags(prompt)
    assert len(parsed) == 1
    path = tmp_path / "run.yaml"
    path.write_text(path.read_text().replace("examples/tiny_base", "another"))
    assert folder.params()["base.model"] == "another"
    path.unlink()
    assert folder.params().keys().isdisjoint({"base.model"})


def test_a_run_file_that_does_not_load_is_sent_as_written(tmp_path: Path) -> None:
    folder = RunMetadata(write_inputs(tmp_path))
    path = tmp_path / "run.yaml"
    path.write_text(path.read_text().replace("training:", "older_setting: 1\ntraining:"))
    assert {prompt["name"] for prompt in folder.prompts} == set(PROMPTS)
    assert "older_setting: unknown setting" in (folder.problem or "")
    params = folder.prompt_params(folder.prompts[0])
    assert params["learning_rate"] == "0.003"
    assert "seed" not in params, "no default is guessed"
    assert folder.tracking.experiment == "support"
    path.write_text(path.read_text().replace("system_metrics: false", "system_metrics: never"))
    with pytest.raises(BadInput, match=r"run\.yaml: tracking\.system_metrics"):
        _ = folder.tracking


def test_a_run_file_without_init_has_the_default_of_the_run_file(tmp_path: Path) -> None:
    folder = RunMetadata(write_inputs(tmp_path))
    run = json.loads(json.dumps(folder.settings))
    del run["prompts"][0]["init"]
    (tmp_path / "run.yaml").write_text(json.dumps(run))
    assert folder.prompt_params(folder.prompts[0])["init"] == "auto"


def test_a_dollar_in_the_store_s_path_is_not_expanded_again(tmp_path: Path) -> None:
    run = json.loads(json.dumps(RunMetadata(write_inputs(tmp_path)).settings))
    run["tracking"]["uri"] = "sqlite:///$$HOME/mlflow.db"
    (tmp_path / "run.yaml").write_text(json.dumps(run))
    loaded = config.load(tmp_path / "run.yaml")
    (tmp_path / "run.yaml").write_text(config.dump(loaded))
    assert config.load(tmp_path / "run.yaml").tracking.uri == "sqlite:///$HOME/mlflow.db"
    assert RunMetadata(tmp_path).tracking.uri == "sqlite:///$HOME/mlflow.db"


@pytest.mark.parametrize("tags", ["[" * 100_000, "[]", "{", '{"a": 1, "team": "x"}'])
def test_tags_of_the_environment_may_be_invalid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tags: str
) -> None:
    monkeypatch.setenv("MLFLOW_TAGS", tags)
    sent = RunMetadata(write_inputs(tmp_path)).tags()
    assert sent["kind"] == "run"
    assert (sent.get("team") == "x") == ("team" in tags)
