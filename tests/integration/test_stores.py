"""Which MLflow store a run uses, how a new one is created, and where credentials are sent."""

from __future__ import annotations

import os
import shlex
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from mlflow.exceptions import MlflowException

from tests.integration.test_mlflow import (
    assert_complete,
    client_of,
    runs,
    sync,
)
from tests.integration.test_mlflow import store as store
from tests.mlflow_server import wait_until
from tests.unit.run_folder import STEPS, finished_run, log_steps, write_inputs, write_results
from trainer.reporting.mlflow_note import read_results
from trainer.runtime.errors import BadInput
from trainer.tracking import MetricsLog, TrackingClient, sqlite_store
from trainer.tracking.pusher import Pusher, SyncResult
from trainer.tracking.pusher import sync as sync_here
from trainer.tracking.store_uri import resolve

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]
TOKEN = "token-of-the-environment"


def test_a_sender_that_is_killed_while_it_creates_the_store_leaves_none(
    tmp_path: Path, store: str
) -> None:
    """Two senders then create it and write to it at once."""
    first = write_inputs(tmp_path / "first")
    MetricsLog(first).close()
    sender = TrackingClient(first)
    sender.start()
    log = first / "logs" / "tracking.log"
    wait_until(lambda: "Updating database tables" in log.read_text(), 120)
    assert sender.pid is not None
    os.kill(sender.pid, signal.SIGKILL)
    assert not sender.finish(1).complete
    assert not (tmp_path / "mlflow.db").exists()

    folders = [first, write_inputs(tmp_path / "second", experiment="other")]
    senders = [TrackingClient(folder, every=0.1) for folder in folders]
    for folder, sender in zip(folders, senders, strict=True):
        sender.start()
        log_steps(MetricsLog(folder), 0, 40)
        write_results(folder)
    done = [sender.finish(120) for sender in senders]
    assert [result.complete for result in done] == [True, True], done
    assert all(result.message.startswith("mlflow ui\nthen open http") for result in done)
    assert_complete(folders[0], store)
    assert_complete(folders[1], store, "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "first",
        "mlflow.db",
        "mlruns",
        "second",
    ]


def test_an_incomplete_store_is_created_again(tmp_path: Path, store: str) -> None:
    from mlflow.store.tracking.dbmodels.initial_models import Base
    from sqlalchemy import create_engine

    folder = finished_run(tmp_path / "run ? 'x' %41")
    own = folder / "mlflow.db"  # as runs had before
    engine = create_engine(sqlite_store.sqlite_uri(own))
    Base.metadata.create_all(engine)
    engine.dispose()
    os.utime(own, (1, 1))
    result = sync_here(folder, read_results)
    assert result.complete, result.message
    uri = f"sqlite:///{tmp_path}/run %3F 'x' %2541/mlflow.db"
    assert f"mlflow ui --backend-store-uri {shlex.quote(uri)}\n" in result.message
    assert_complete(folder, uri)
    assert (folder / "mlflow.db.incomplete-1").exists()
    assert not (tmp_path / "mlflow.db").exists()


@pytest.mark.parametrize("content", ["text", "table of another program", "cut"])
def test_a_file_that_is_not_a_store_is_left_alone(tmp_path: Path, content: str) -> None:
    path = tmp_path / "mlflow.db"
    with sqlite3.connect(path) as database_:
        database_.execute("CREATE TABLE bookmarks (url TEXT)")
    database_.close()
    if content == "text":
        path.write_text("not a database")
    elif content == "cut":
        path.write_bytes(path.read_bytes()[:3000])
    os.utime(path, (1, 1))
    before = path.read_bytes()
    with pytest.raises(BadInput, match="move it away, or give another file"):
        sqlite_store.prepare(path, str(tmp_path / "files"))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_an_older_store_with_runs_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    with sqlite3.connect(path) as older:
        older.execute("CREATE TABLE experiments (experiment_id INTEGER)")
        older.execute("CREATE TABLE runs (run_uuid TEXT)")
        older.execute("INSERT INTO runs VALUES ('x')")
    older.close()
    os.utime(path, (1, 1))
    sqlite_store.prepare(path, str(tmp_path / "files"))
    assert list(tmp_path.iterdir()) == [path]


class Recorder:
    """A server that refuses every request and records it with its credentials."""

    def __init__(self) -> None:
        self.seen: list[str | None] = []
        recorder = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                recorder.seen.append(self.headers.get("Authorization"))
                self.send_response(401)
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"no")

            do_GET = do_POST = do_PUT = answer

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.uri = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    recorder = Recorder()
    yield recorder
    recorder.http.shutdown()
    recorder.http.server_close()


def test_a_folder_from_elsewhere_gets_no_credentials(
    tmp_path: Path, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither from the environment nor from the home folder, until its server is confirmed."""
    folder = finished_run(tmp_path / "run", uri=recorder.uri)
    home = tmp_path / "home"
    (home / ".mlflow").mkdir(parents=True)
    (home / ".mlflow" / "credentials").write_text(
        "[mlflow]\nmlflow_tracking_username = me\nmlflow_tracking_password = secret\n"
    )
    monkeypatch.setenv("HOME", str(home))
    answer = sync(folder, expect=1)
    assert set(recorder.seen) == {None}
    confirm = f"promptshard sync run --uri {recorder.uri}"
    assert (
        f"were not sent, as only the folder names this server; if it is yours, run: {confirm}"
        in (answer.stderr)
    )
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", TOKEN)
    (home / ".mlflow" / "credentials").unlink()
    for named in ({}, {"MLFLOW_TRACKING_URI": "http://127.0.0.1:1"}):
        recorder.seen.clear()
        sync(folder, expect=1, **named)
        assert set(recorder.seen) == {None}
    recorder.seen.clear()
    done = subprocess.run(
        [sys.executable, "-m", "launch", "sync", str(folder), "--uri", recorder.uri],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1, done.stderr
    assert set(recorder.seen) == {f"Bearer {TOKEN}"}


def test_experiments_and_runs_that_the_environment_names(
    tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = checked(finished_run(tmp_path / "first"))
    client = client_of(store)
    deleted = client.get_experiment_by_name("support").experiment_id
    client.delete_experiment(deleted)
    refused = sync_here(finished_run(tmp_path / "second"), read_results)
    assert not refused.complete
    assert "experiment 'support' is deleted in MLflow; restore it" in refused.message
    assert f"--experiment-id {deleted}" in refused.message
    run_file = tmp_path / "first" / "run.yaml"  # the other remedy, of a run that was sent before
    run_file.write_text(run_file.read_text().replace("experiment: support", "experiment: other"))
    checked(tmp_path / "first")
    assert_complete(tmp_path / "first", store, "other")
    client.restore_experiment(deleted)

    named = client.create_experiment("by number")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", named)
    checked(finished_run(tmp_path / "third", experiment="promptshard"))
    parent, _ = runs(store, "by number")
    assert parent.info.run_name == "third"
    assert_complete(tmp_path / "third", store, "by number")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "987654")
    refused = sync_here(finished_run(tmp_path / "fourth", experiment="promptshard"), read_results)
    assert "MLFLOW_EXPERIMENT_ID=987654: MLflow has no such experiment" in refused.message
    monkeypatch.delenv("MLFLOW_EXPERIMENT_ID")

    given = client.create_run(client.create_experiment("given")).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", given)
    adopted = checked(finished_run(tmp_path / "fifth"))
    other = checked(finished_run(tmp_path / "sixth"))
    assert adopted.run_id == given
    assert other.run_id not in (given, first.run_id)
    assert other.points == adopted.points


@pytest.mark.parametrize(
    ("deleted", "when"), [("all", "training"), ("parent", "ending"), ("prompt", "training")]
)
def test_runs_that_are_deleted_in_mlflow_during_training_are_created_again(
    tmp_path: Path, store: str, deleted: str, when: str
) -> None:
    folder = write_inputs(tmp_path / "run")
    log, target = MetricsLog(folder), resolve(folder)
    with target.applied():
        pusher = Pusher(folder, target, read_results)
        log_steps(log, 0, 40 if when == "training" else STEPS)
        pusher.push(running=True)
        run_ids = {None: pusher.progress.run_id, **pusher.progress.prompts}
        chosen = {"all": list(run_ids), "parent": [None], "prompt": ["triage"]}[deleted]
        for name in chosen:
            client_of(store).delete_run(str(run_ids[name]))
        if when == "training":
            log_steps(log, 41, STEPS)
            with pytest.raises(MlflowException, match="deleted"):
                pusher.push(running=True)
            pusher.push(running=True)
        write_results(folder)
        if when == "ending":
            with pytest.raises(MlflowException, match="deleted"):
                pusher.end()
        pusher.end()
        assert not pusher.unsent()
    parent, prompts = runs(store)
    changed = {name: run.info.run_id for name, run in {None: parent, **prompts}.items()}
    assert {name for name in run_ids if changed[name] != run_ids[name]} == set(chosen)
    assert {run.data.tags["mlflow.parentRunId"] for run in prompts.values()} == {changed[None]}
    assert_complete(folder, store)
    files = {file.path for file in client_of(store).list_artifacts(parent.info.run_id)}
    assert {"run.yaml", "summary.json"} <= files


def test_a_run_that_resumes_in_a_moved_folder_shows_its_new_place(
    tmp_path: Path, store: str
) -> None:
    folder, moved = write_inputs(tmp_path / "run"), tmp_path / "moved"
    target = resolve(folder)
    with target.applied():
        Pusher(folder, target).push(running=True)
        folder.rename(moved)
        Pusher(moved, target).push(running=True)
    parent, prompts = runs(store)
    places = {run.data.tags["output_dir"] for run in (parent, *prompts.values())}
    assert places == {str(moved)}


def test_long_names_and_values_fit_into_every_database(tmp_path: Path, store: str) -> None:
    """Other databases than SQLite refuse longer ones, and then the run is not sent at all."""
    folder = write_inputs(tmp_path / ("f" * 245))
    key = "base.chat_template_kwargs." + "k" * 300
    target = resolve(folder)
    with target.applied():
        pusher = Pusher(folder, target)
        pusher.push(running=True)
        store_now = pusher._store
        assert store_now is not None
        run_id = store_now.run_ids["triage"]
        run = client_of(store).get_run(run_id)
        assert run.info.run_name.endswith(" / triage")
        assert len(run.info.run_name) == 250
        store_now._log_params(run_id, {key[:250]: "v" * 6000}, {key[:250]: "before"})
    tags = client_of(store).get_run(run_id).data.tags
    (changed,) = [key for key in tags if key.startswith("resumed.base.chat")]
    assert len(changed) == 250
    assert len(tags[changed]) == 5000


def checked(folder: Path) -> SyncResult:
    result: Any = sync_here(folder, read_results)
    assert result.complete, result.message
    return result
