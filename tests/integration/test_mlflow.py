"""Tracking with real MLflow stores, and with servers that fail in several ways."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from launch.launcher_command import free_port
from tests.distributed.test_run import one_process, write_run_file
from tests.mlflow_server import Proxy, Server, wait_until
from tests.unit.run_folder import (
    PROMPTS,
    STEPS,
    finished_run,
    log_steps,
    write_inputs,
    write_results,
)
from trainer import config
from trainer.reporting.mlflow_note import read_results
from trainer.tracking import MetricsLog, TrackingClient, process_client, sender_process
from trainer.tracking.metrics_log import METRICS_FILE, read_lines
from trainer.tracking.progress_file import ProgressFile
from trainer.tracking.pusher import Pusher
from trainer.tracking.pusher import sync as sync_here
from trainer.tracking.store_uri import resolve

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]
ROOT = Path(__file__).resolve().parents[2]
SECRET = "hunter2-secret"
#: A call that waits for a broken server takes longer: MLflow waits 120 s for an answer.
ANSWER_SECONDS = 30


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Use the default store of a new working directory, without MLflow settings."""
    for name in os.environ:
        if name.startswith("MLFLOW_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    return f"sqlite:///{tmp_path}/mlflow.db"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    server.start()
    yield server
    server.kill()


@pytest.fixture(params=["hangs", "answers 500", "is not there"])
def broken(request: pytest.FixtureRequest) -> Iterator[str]:
    """URL of a server that only accepts connections, answers errors, or does not exist."""
    if request.param == "is not there":
        yield f"http://127.0.0.1:{free_port()}"
        return
    listener = socket.create_server(("127.0.0.1", 0))
    held: list[socket.socket] = []

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            held.append(connection)
            if request.param == "answers 500":
                connection.recv(65536)
                connection.sendall(b"HTTP/1.1 500 no\r\nContent-Length: 2\r\n\r\nno")
                connection.close()

    threading.Thread(target=serve, daemon=True).start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    listener.close()
    for connection in held:
        connection.close()


def test_a_complete_run_in_sqlite_is_sent_once(tmp_path: Path, store: str) -> None:
    folder = finished_run(tmp_path / "support")
    assert "MLflow has all of run" in sync(folder).stdout
    parent, prompts = runs(store)
    assert parent.info.status == "FINISHED"
    assert {run.info.status for run in prompts.values()} == {"FINISHED"}
    assert parent.info.run_name == "support"
    assert set(prompts) == set(PROMPTS)
    assert parent.data.params["base.quantization"] == "int8"
    assert prompts["triage-mlp"].data.params["num_virtual_tokens"] == "10"
    assert "**triage** (20 virtual tokens)" in parent.data.tags["mlflow.note.content"]
    assert prompts["triage"].data.metrics["validation_accuracy_best"] == 0.94
    assert {name for name, run in prompts.items() if "selected" in run.data.tags} == {"triage"}
    assert prompts["animals"].data.tags["stopped"] == "finished"
    assert len(parent.inputs.dataset_inputs) == 6
    names = {item.dataset.name for item in prompts["animals"].inputs.dataset_inputs}
    assert names == {"animals train", "animals validation", "animals validation (shifted)"}
    assert_complete(folder, store)
    client = client_of(store)
    files = {file.path for file in client.list_artifacts(parent.info.run_id)}
    expected = {"run.yaml", "environment.json", "datasets.json", "summary.json", "report.html"}
    assert files == expected | {"plots"}
    plots = {file.path for file in client.list_artifacts(parent.info.run_id, "plots")}
    assert plots
    assert all(path.endswith(".png") for path in plots)
    adapter = {f.path for f in client.list_artifacts(prompts["triage"].info.run_id, "adapter")}
    assert adapter == {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}

    assert_models(store, "support", ["triage", "triage-mlp", "animals"])
    for lost in ("", '"offsets": {', '"models": {'):  # then the store itself is asked
        state = (folder / "tracking.json").read_text()
        if lost:
            assert lost in state
            (folder / "tracking.json").write_text(state.replace(lost, f'"x{lost[1:]}'))
        repeated = sync_here(folder, read_results)
        assert (repeated.complete, repeated.points) == (True, 0)
        assert_complete(folder, store)
        assert_models(store, "support", ["triage", "triage-mlp", "animals"])


def test_a_resumed_run_replaces_scores_of_the_same_step(tmp_path: Path, store: str) -> None:
    """As after other hand-written prompts, another choice of the best prompt, and more steps."""
    folder = finished_run(tmp_path / "support")
    assert sync_here(folder, read_results).complete
    path = folder / "summary.json"
    summary = json.loads(path.read_text())
    summary["tasks"]["triage"]["hand_written"][0]["validation_accuracy"] = 0.75
    summary["selected"]["triage"]["prompt"] = "triage-mlp"
    path.write_text(json.dumps(summary))
    assert sync_here(folder, read_results).complete
    _, prompts = runs(store)
    triage = prompts["triage"]
    assert triage.data.metrics["validation_accuracy_hand_written"] == 0.75
    assert triage.data.metrics["validation_accuracy_best"] == 0.94
    assert "selected" not in triage.data.tags
    assert prompts["triage-mlp"].data.tags["selected"] == "yes"
    assert sync_here(folder, read_results).points == 0
    key = "validation_accuracy_hand_written"
    history = client_of(store).get_metric_history(triage.info.run_id, key)
    assert sorted((point.step, point.value) for point in history) == [(STEPS, 0.69), (STEPS, 0.75)]


def assert_models(uri: str, experiment: str, names: list[str]) -> None:
    """Assert that each prompt is one model, in the order of accuracy, with every score once."""
    client = client_of(uri)
    _, prompts = runs(uri, experiment)
    models = client.search_logged_models(
        [client.get_experiment_by_name(experiment).experiment_id],
        filter_string="model_type = 'soft-prompt' AND tags.task LIKE '%'",
        order_by=[{"field_name": "metrics.validation_accuracy_best", "ascending": False}],
    )
    assert sorted(model.name for model in models) == sorted(names)
    scores = {model.name: dict[str, float]() for model in models}
    for model in models:
        run = prompts[model.name]
        assert model.source_run_id == run.info.run_id
        (output,) = run.outputs.model_outputs
        assert output.model_id == model.model_id
        assert str(model.status) == "READY"
        assert model.params == run.data.params
        assert model.tags["stopped"] == "finished"
        counts = Counter((metric.key, metric.step) for metric in model.metrics)
        assert set(counts.values()) == {1}
        for metric in model.metrics:
            shifted = " (shifted)" if metric.key.startswith("shifted_") else ""
            assert metric.dataset_name == f"{model.tags['task']} validation{shifted}"
            assert metric.value == run.data.metrics[metric.key]
            scores[model.name][metric.key] = metric.value
    order = [scores[model.name]["validation_accuracy_best"] for model in models]
    assert order == sorted(order, reverse=True)
    assert not any(key.endswith("no_prompt") for row in scores.values() for key in row)


@pytest.mark.fault("tracking server unreachable, killed, hanging or answering HTTP 500")
def test_a_server_that_stores_a_request_and_answers_500(tmp_path: Path, server: Server) -> None:
    """Nothing is sent twice, although the answer to every request that writes was lost."""
    folder = finished_run(tmp_path / "run", experiment="stored")
    proxy = Proxy(server.uri)
    proxy.mode = "stores, answers 500"
    uri = f"http://{proxy.address}"
    calls = 0  # each repeats the request whose answer was lost
    while not (result := sync_here(folder, read_results, uri)).complete:
        calls += 1
        assert calls < 60, result.message
    proxy.mode = "passes"
    assert sync_here(folder, read_results, uri).points == 0
    proxy.close()
    assert calls > 5
    assert_complete(folder, server.uri, "stored")
    assert_models(server.uri, "stored", ["triage", "triage-mlp", "animals"])


def test_a_server_without_models_gets_everything_else(tmp_path: Path, server: Server) -> None:
    folder = finished_run(tmp_path / "run", experiment="old")
    proxy = Proxy(server.uri)
    proxy.mode = "has no models"
    uri = f"http://{proxy.address}"
    message = sync_here(folder, read_results, uri).message
    assert message.count("older than MLflow 3") == 1
    assert_complete(folder, server.uri, "old")
    assert_models(server.uri, "old", [])
    proxy.mode = "passes"  # after an update of the server
    assert "MLflow 3" not in sync_here(folder, read_results, uri).message
    assert_models(server.uri, "old", ["triage", "triage-mlp", "animals"])
    proxy.close()


def test_a_server_that_does_not_know_its_host_name(tmp_path: Path, server: Server) -> None:
    folder = write_inputs(tmp_path / "run")
    proxy = Proxy(server.uri)
    proxy.mode = "other host"
    message = sync_here(folder, read_results, f"http://{proxy.address}").message
    proxy.close()
    assert "Invalid Host header" in message
    assert f"mlflow server --allowed-hosts {proxy.address}" in message


REMEDIES = [
    ("401", "http", "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or _TOKEN"),
    ("403", "http", "of a user who may edit the experiment"),
    ("404", "http", "no MLflow server answers at"),
    ("200", "http", "no MLflow server answers at"),
    ("passes", "https", "write http:// instead of https://"),
]


class EndsWithTheRun:
    """A trainer that ends when the sender stops trying."""

    is_gone = False

    def wait(self, seconds: float) -> bool:
        return seconds == math.inf


@pytest.mark.parametrize(("mode", "scheme", "remedy"), REMEDIES)
def test_a_refusal_is_explained_and_not_repeated_forever(
    tmp_path: Path, mode: str, scheme: str, remedy: str
) -> None:
    proxy = Proxy("http://127.0.0.1:1")
    proxy.mode = mode
    folder = write_inputs(tmp_path / "run")
    target = resolve(folder, f"{scheme}://{proxy.address}")
    with target.applied():
        pusher = Pusher(folder, target, read_results)
        sender_process._follow(pusher, EndsWithTheRun(), 0.001)  # type: ignore[arg-type]
        assert len(proxy.asked) <= 2 * sender_process.MAX_REFUSALS
        assert remedy in (ProgressFile(folder).problem or "")
        proxy.close()


def test_a_sender_that_is_refused_waits_for_the_end_of_the_run(
    tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The terminal shows the remedy once; ``sync`` sends everything later."""
    monkeypatch.setattr(process_client, "CHECK_SECONDS", 0.0)
    proxy = Proxy("http://127.0.0.1:1")
    mode, _, remedy = REMEDIES[0]
    proxy.mode = mode
    folder = write_inputs(tmp_path / "run")
    log, sender = MetricsLog(folder), TrackingClient(folder, f"http://{proxy.address}", every=0.01)
    sender.start()
    tracking_log = folder / "logs" / "tracking.log"
    last = "next try at the end of the run"
    wait_until(lambda: tracking_log.exists() and last in tracking_log.read_text(), 120)
    asked = len(proxy.asked)
    problems = list(filter(None, (sender.new_problem() for _ in range(3))))
    log_steps(log, 0, STEPS)
    write_results(folder)
    result = sender.finish(60)
    assert len(proxy.asked) <= asked + 2
    proxy.close()
    assert len(problems) == 1
    assert remedy in problems[0]
    assert remedy in result.message
    assert "promptshard sync" in result.message
    assert sync_here(folder, read_results, store).complete
    assert_complete(folder, store)


def test_a_sweep_is_compared_by_one_search(
    tmp_path: Path, store: str, request: pytest.FixtureRequest
) -> None:
    """Settings, scores and final states of all its prompts have the same names."""
    import mlflow

    folder = write_inputs(tmp_path / "sweep")
    prompts = expanded(folder)
    names = [prompt["name"] for prompt in prompts]
    assert names == sorted(names)
    ends = ["finished", "early_stopping", "halving", "diverged"]
    results = {
        name: {
            "task": "triage",
            "validation_accuracy": 0.5 + i / 100,
            "best_step": i + 1,
            "stopped": {"step": i + 2, "reason": ends[i % len(ends)]},
        }
        for i, name in enumerate(names)
    }
    summary = {"status": "finished", "steps": 20, "prompts": results, "tasks": {}}
    (folder / "summary.json").write_text(json.dumps(summary))
    log = MetricsLog(folder)
    for step in (1, 2):
        for i, name in enumerate(names):
            log.log(step, 100 * step, {"train_loss": i + step}, prompt=name)
    log.close()
    sync(folder)

    request.addfinalizer(lambda: mlflow.set_tracking_uri(None))
    mlflow.set_tracking_uri(store)
    table = mlflow.search_runs(
        experiment_names=["support"],
        filter_string="tags.kind = 'prompt'",
        order_by=["attributes.run_name ASC"],
    )
    (parent,) = mlflow.search_runs(
        experiment_names=["support"], filter_string="tags.kind = 'run'", output_format="list"
    )
    assert list(table["tags.mlflow.runName"]) == [f"sweep / {name}" for name in names]
    assert list(table["tags.mlflow.parentRunId"]) == [parent.info.run_id] * len(names)
    for key in ("learning_rate", "num_virtual_tokens", "seed", "init"):
        values = [p["init"] if key == "init" else str(p[key]) for p in prompts]
        assert list(table[f"params.{key}"]) == values
    assert set(table["params.data_seed"]) == {"7"}
    assert list(table["tags.stopped"]) == [ends[i % len(ends)] for i in range(len(names))]
    scores = [0.5 + i / 100 for i in range(len(names))]
    assert list(table["metrics.validation_accuracy_best"]) == pytest.approx(scores)
    assert list(table["metrics.train_loss"]) == [i + 2.0 for i in range(len(names))]


def expanded(folder: Path) -> list[dict[str, Any]]:
    """Turn the folder's run into a sweep; return its prompts with ``init`` as text."""
    rates, lengths, seeds = [0.001, 0.03], [5, 20], [8, 9, 10]
    sweep = {"learning_rate": rates, "num_virtual_tokens": lengths, "seed": seeds}
    sweep |= {"init": [{"from": "other/prompts/p"}, "labels"]}
    run = yaml.safe_load((folder / "run.yaml").read_text())
    run["prompts"] = [{"name": "p", "task": "triage", "data_seed": 7, "sweep": sweep}]
    run["tasks"] = [{k: v for k, v in run["tasks"][0].items() if k != "hand_written"}]
    (folder / "written.yaml").write_text(yaml.safe_dump(run))
    (folder / "run.yaml").write_text(config.dump(config.load(folder / "written.yaml")))
    prompts: list[dict[str, Any]] = yaml.safe_load((folder / "run.yaml").read_text())["prompts"]
    words = {True: "labels", False: "from: other/prompts/p"}
    return [prompt | {"init": words[prompt["init"]["labels"]]} for prompt in prompts]


def test_sync_refuses_a_folder_that_is_not_a_run(tmp_path: Path) -> None:
    answer = sync(tmp_path, expect=2)
    assert "is not a run directory (no run.yaml)" in answer.stderr


@pytest.mark.fault("tracking server unreachable, killed, hanging or answering HTTP 500")
def test_over_http_with_the_server_killed_in_between(tmp_path: Path, server: Server) -> None:
    folder = write_inputs(tmp_path / "http", experiment="http")
    uri = server.uri.replace("http://", f"http://me:{SECRET}@")
    log = MetricsLog(folder)
    sender = TrackingClient(folder, uri, every=0.2)
    sender.start()
    log_steps(log, 0, 40)
    wait_until(lambda: sent(folder) > 0, 60)
    server.kill()
    started = time.monotonic()
    log_steps(log, 41, 80)
    assert time.monotonic() - started < ANSWER_SECONDS
    time.sleep(1.0)
    server.start()
    log_steps(log, 81, STEPS)
    write_results(folder)
    result = sender.finish(60)
    if not result.complete:  # the pause after the last failure may be longer than the run
        assert "promptshard sync" in result.message
        sync(folder, MLFLOW_TRACKING_URI=uri)
    parent, _ = runs(server.uri, "http")
    assert parent.info.status == "FINISHED"
    assert_complete(folder, server.uri, "http")
    # Nothing in the folder, what was sent, or what the server wrote has the password in it.
    sync(folder, MLFLOW_TRACKING_URI=uri)
    for place in (folder, server.folder):
        for file in place.rglob("*"):
            if file.is_file():
                assert SECRET.encode() not in file.read_bytes(), file


@pytest.mark.fault("tracking server unreachable, killed, hanging or answering HTTP 500")
@pytest.mark.fault("secrets in the tracking URI")
def test_a_broken_tracker_does_not_delay_the_trainer(
    tmp_path: Path, store: str, broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_inputs(tmp_path / "run")
    uri = broken.replace("http://", f"http://me:{SECRET}@")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    log, sender = MetricsLog(folder), TrackingClient(folder, every=0.2)
    started = time.monotonic()
    sender.start()
    log_steps(log, 0, STEPS)
    assert time.monotonic() - started < ANSWER_SECONDS
    pid = sender.pid
    assert pid is not None
    wait_until(lambda: (folder / "tracking.json").exists(), 60)
    write_results(folder)
    started = time.monotonic()
    result = sender.finish(4)
    assert time.monotonic() - started < ANSWER_SECONDS
    assert not result.complete
    assert "metric lines" in result.message
    assert "promptshard sync" in result.message
    assert not psutil.pid_exists(pid)
    answer = sync(folder, expect=1, MLFLOW_TRACKING_URI=uri, MLFLOW_HTTP_REQUEST_TIMEOUT="2")
    assert SECRET not in result.message + answer.stdout + answer.stderr
    for file in folder.rglob("*"):
        assert file.is_dir() or SECRET.encode() not in file.read_bytes(), file
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    sync(folder, PROMPTSHARD_TRACKING_URI=store)  # as with --uri
    assert_complete(folder, store)


@pytest.mark.fault("tracking server unreachable, killed, hanging or answering HTTP 500")
@pytest.mark.fault("artifact upload fails")
@pytest.mark.fault("secrets in the tracking URI")
def test_training_succeeds_while_the_tracking_server_fails_hangs_and_dies(
    tmp_path: Path, server: Server
) -> None:
    """Its metrics equal those of an untracked run, and MLflow gets each once when it is reachable.

    The server accepts the first curves, then fails in one way after another. Finally only its
    artifact store fails.
    """
    run_file = write_run_file(tmp_path)
    run = yaml.safe_load(run_file.read_text())
    run["prompts"] = run["prompts"][:1]
    run_file.write_text(yaml.safe_dump(run))
    alone = one_process("trainer", str(run_file))
    assert alone.returncode == 0, alone.stderr
    proxy, folder = Proxy(server.uri), tmp_path / "tracked"
    uri = f"http://me:{SECRET}@{proxy.address}"
    kept = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
    kept |= {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1", "MLFLOW_TRACKING_URI": uri}
    words = [
        str(run_file),
        f"output_dir={folder}",
        "tracking.experiment=faults",
        "tracking.uri=null",
    ]
    training = subprocess.Popen(
        [sys.executable, "-m", "trainer", *words],
        cwd=ROOT,
        env=kept,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_until(lambda: any("runs/create" in request for request in proxy.asked), 120)
    for step, mode in ((1, "answers 500"), (4, "hangs")):
        wait_until(lambda step=step: last_step(folder) >= step, 60)  # type: ignore[misc]
        proxy.mode = mode
    wait_until(lambda: last_step(folder) >= 7, 60)
    proxy.close()
    output, _ = training.communicate(timeout=120)
    assert training.returncode == 0, output
    assert "kept locally. Upload with: promptshard sync" in output
    assert losses(folder) == losses(tmp_path / "run")
    adapters = [
        place / "prompts/soft/adapter_model.safetensors" for place in (folder, tmp_path / "run")
    ]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()

    proxy = Proxy(server.uri)
    uri = f"http://me:{SECRET}@{proxy.address}"
    proxy.mode = "takes no files"
    answer = sync(folder, expect=1, MLFLOW_TRACKING_URI=uri)
    assert re.search(r"Not sent: \d+ files", answer.stderr)
    assert adapters[0].exists()
    proxy.mode = "passes"
    sync(folder, MLFLOW_TRACKING_URI=uri)
    proxy.close()
    parent, prompts = runs(server.uri, "faults")
    assert {run.info.status for run in [parent, *prompts.values()]} == {"FINISHED"}
    assert_complete(folder, server.uri, "faults")
    files = client_of(server.uri).list_artifacts(prompts["soft"].info.run_id, "adapter")
    assert "adapter/adapter_model.safetensors" in {file.path for file in files}
    assert SECRET not in output + answer.stdout + answer.stderr
    for file in folder.rglob("*"):
        assert file.is_dir() or SECRET.encode() not in file.read_bytes(), file


@pytest.mark.fault("artifact upload fails")
def test_metrics_do_not_wait_for_files_that_cannot_be_stored(
    tmp_path: Path, server: Server
) -> None:
    """The user reads why during training, and failed uploads are repeated after a pause."""
    folder, proxy = write_inputs(tmp_path / "run", experiment="no files"), Proxy(server.uri)
    proxy.mode = "takes no files"
    target, log = resolve(folder, f"http://{proxy.address}"), MetricsLog(folder)
    with target.applied():
        pusher = Pusher(folder, target, read_results)
        for first, last in ((0, 40), (41, STEPS)):
            log_steps(log, first, last)
            pusher.push(running=True)
    uploads = [request for request in proxy.asked if "/mlflow-artifacts/" in request]
    assert len(uploads) == 3
    assert proxy.asked.index(uploads[0]) > proxy.asked.index("POST /api/2.0/mlflow/runs/log-batch")
    assert "500" in str(pusher.upload_problem)
    assert_complete(folder, server.uri, "no files")
    proxy.close()


@pytest.mark.fault("artifact upload fails")
def test_a_run_ends_in_mlflow_although_uploads_hang(tmp_path: Path, server: Server) -> None:
    folder, proxy = write_inputs(tmp_path / "run", experiment="hanging files"), Proxy(server.uri)
    proxy.mode = "hangs on files"
    sender = TrackingClient(folder, f"http://{proxy.address}", every=0.1)
    sender.start()
    log_steps(MetricsLog(folder), 0, STEPS)
    wait_until(lambda: sent(folder) > 0, 60)
    write_results(folder)
    result = sender.finish(20)
    proxy.close()
    assert "files" in result.message
    parent, prompts = runs(server.uri, "hanging files")
    assert {run.info.status for run in [parent, *prompts.values()]} == {"FINISHED"}
    assert prompts["triage"].data.metrics["validation_accuracy_best"] == 0.94
    assert_complete(folder, server.uri, "hanging files")


def last_step(folder: Path) -> int:
    path = folder / METRICS_FILE
    return max((line.step for line, _ in read_lines(path) if line), default=0)


def losses(folder: Path) -> dict[tuple[str, int, str], float]:
    return {
        (line.prompt, line.step, name): value
        for line, _ in read_lines(folder / METRICS_FILE)
        if line is not None and line.prompt is not None
        for name, value in line.metrics.items()
    }


TRAINER = """
    import os, signal, sys, time
    from pathlib import Path
    from trainer.tracking import MetricsLog, TrackingClient
    from tests.unit.run_folder import log_steps, write_results
    folder, rewind, last = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    log = MetricsLog(folder)
    log.rewind(rewind)
    sender = TrackingClient(folder, every=0.2, grace=20)
    sender.start()
    print(sender.pid, flush=True)
    log_steps(log, rewind + 1, last)
    if last < 120:
        time.sleep(float(sys.argv[4]))
        os.kill(os.getpid(), signal.SIGKILL)
    write_results(folder)
    print(sender.finish(60), flush=True)
"""


@pytest.mark.fault("two ranks requeued")
def test_a_run_killed_twice_is_one_mlflow_run_without_duplicates(
    tmp_path: Path, store: str
) -> None:
    folder = write_inputs(tmp_path / "run", system_metrics=True)
    first, _ = train(folder, 0, 50, pause=0.0)  # killed while the sender still starts
    wait_until(lambda: not psutil.pid_exists(first), 30)
    parent, _ = runs(store)
    assert parent.info.status == "KILLED"
    second, _ = train(folder, 40, 90, pause=8.0)  # from the checkpoint of step 40
    _, out = train(folder, 80, STEPS)  # at once: the second sender may still be running
    assert "complete=True" in out
    wait_until(lambda: not psutil.pid_exists(second), 30)
    again, prompts = runs(store)
    assert again.info.run_id == parent.info.run_id
    assert {run.info.status for run in [again, *prompts.values()]} == {"FINISHED"}
    assert_complete(folder, store)
    assert any(key.startswith("system/cpu") for key in again.data.metrics)
    log = (folder / "logs" / "tracking.log").read_text()
    assert "trainer gone" in log
    assert "Traceback" not in log
    assert "not sent, next try" not in log


def test_the_sender_survives_ctrl_c_and_ends_on_request(tmp_path: Path, store: str) -> None:
    folder = write_inputs(tmp_path / "run")
    log, sender = MetricsLog(folder), TrackingClient(folder, every=0.2)
    sender.start()
    assert sender.pid is not None
    wait_until(lambda: (folder / "tracking.json").exists(), 30)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(sender.pid, number)
    assert "still sending" in sync(folder, expect=2).stderr
    log_steps(log, 1, 3)
    write_results(folder, status="failed")
    assert sender.finish(60).complete
    parent, _ = runs(store)
    assert parent.info.status == "FAILED"


def train(folder: Path, rewind: int, last: int, pause: float = 0.0) -> tuple[int, str]:
    """Run a trainer process; return the PID of its tracking process and its output."""
    options = [str(folder), str(rewind), str(last), str(pause)]
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(TRAINER), *options],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert process.returncode in (0, -signal.SIGKILL), process.stderr
    pid, _, rest = process.stdout.partition("\n")
    return int(pid), rest


def sync(folder: Path, expect: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "trainer.commands.sync", "sync", str(folder)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done


def client_of(uri: str) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(uri)


def runs(uri: str, experiment: str = "support") -> tuple[Any, dict[str, Any]]:
    """Return the parent run and the prompt runs of an experiment."""
    client = client_of(uri)
    result = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    (parent,) = [run for run in result if "mlflow.parentRunId" not in run.data.tags]
    prompts = [run for run in result if run.data.tags.get("mlflow.parentRunId")]
    assert {run.data.tags["mlflow.parentRunId"] for run in prompts} <= {parent.info.run_id}
    by_name = {run.data.tags["prompt"]: run for run in prompts}
    assert len(by_name) == len(prompts)
    return parent, by_name


def assert_complete(folder: Path, uri: str, experiment: str = "support") -> None:
    """Assert that MLflow has every point of ``metrics.jsonl`` once and no other steps."""
    parent, prompts = runs(uri, experiment)
    wanted: dict[tuple[str, str], dict[int, float]] = {}
    for line, _ in read_lines(folder / METRICS_FILE):
        assert line is not None
        run = parent if line.prompt is None else prompts[line.prompt]
        for name, value in {
            **line.metrics,
            "useful_tokens": float(line.useful_tokens or 0),
        }.items():
            wanted.setdefault((run.info.run_id, name), {})[line.step] = value
    client = client_of(uri)
    for (run_id, name), values in wanted.items():
        history = client.get_metric_history(run_id, name)
        assert max(Counter(point.step for point in history).values()) == 1, name
        assert {point.step: point.value for point in history} == pytest.approx(values), name


def sent(folder: Path) -> int:
    """Bytes of ``metrics.jsonl`` that a store has received."""

    if not (folder / "tracking.json").exists():
        return 0
    stores = ProgressFile(folder).stores.values()
    return max((store.offsets.get(METRICS_FILE, 0) for store in stores), default=0)
