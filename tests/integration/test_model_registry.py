"""Models of prompts in MLflow's registry, and hand-written prompts, in a real store."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.integration.test_mlflow import client_of, runs, server
from tests.mlflow_server import Proxy, Server
from tests.unit.run_folder import HAND_WRITTEN, finished_run, write_results
from tests.unit.saved_run import LABELS, ROWS, save_run
from trainer.reporting.mlflow_note import read_results
from trainer.runtime.errors import BadInput
from trainer.tracking.pusher import sync
from trainer.tracking.registry import IS_PROMPT

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]
__all__ = ["server"]  # a fixture


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Yield a store for all tests: each has its own experiment and names of models."""
    import mlflow

    with pytest.MonkeyPatch.context() as patch:
        for name in os.environ:
            if name.startswith("MLFLOW_"):
                patch.delenv(name)
        mlflow.set_tracking_uri(None)  # that of other tests of this process
        yield f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


def test_the_best_and_chosen_prompts_become_versions_once(
    tmp_path: Path, store: str, request: pytest.FixtureRequest
) -> None:
    """Also in a process that uses another store."""
    import mlflow

    request.addfinalizer(lambda: mlflow.set_tracking_uri(None))
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/other.db")
    folder = finished_run(tmp_path / "first", register="notes", experiment="notes")
    assert sync(folder, read_results, store).complete
    client = client_of(store)
    assert [version.tags["prompt"] for version in versions(client, "notes-triage")] == ["triage"]
    assert sync(folder, read_results, store, prompts=["triage-mlp"]).complete
    triage, animals = (versions(client, f"notes-{task}") for task in ("triage", "animals"))
    assert [version.tags["prompt"] for version in triage] == ["triage", "triage-mlp"]
    assert [version.tags["prompt"] for version in animals] == ["animals"]
    assert best(client, "notes-triage").tags["prompt"] == "triage"
    assert best(client, "notes-triage").tags["validation_score"] == "0.94"
    parent, prompts = runs(store, "notes")
    for version in triage:
        model = client.get_logged_model(version.source.removeprefix("models:/"))
        assert model.source_run_id == prompts[version.tags["prompt"]].info.run_id
        assert "mlflow.model.isExternal" not in model.tags

    written = client.search_model_versions(
        "name = 'notes-triage-hand-written' AND tags.`mlflow.prompt.is_prompt` = 'true'"
    )
    texts = [f"{text}{{{{text}}}}\nTopic:" for text, *_ in HAND_WRITTEN["triage"]]
    assert sorted(v.tags["mlflow.prompt.text"] for v in written) == sorted(texts)
    scores = {v.tags["mlflow.prompt.text"]: v.tags["validation_accuracy"] for v in written}
    rows = HAND_WRITTEN["triage"]
    assert scores == dict(zip(texts, [f"{score:.6g}" for _, _, score, _ in rows], strict=True))
    assert "validation_accuracy" not in client.get_prompt("notes-triage-hand-written").tags
    linked = json.loads(parent.data.tags["mlflow.linkedPrompts"])
    assert len(linked) == len(HAND_WRITTEN["triage"]) + len(HAND_WRITTEN["animals"])

    state = (folder / "tracking.json").read_text()
    (folder / "tracking.json").write_text(state.replace('"registered": {', '"x": {'))
    assert sync(folder, read_results, store).complete
    assert versions(client, "notes-triage") == triage
    second = finished_run(tmp_path / "second", register="notes")  # with the same texts
    assert sync(second, read_results, store).complete
    assert len(versions(client, "notes-triage")) == 3
    again = client.search_model_versions(
        "name = 'notes-triage-hand-written' AND tags.`mlflow.prompt.is_prompt` = 'true'"
    )
    assert len(again) == len(written)


@pytest.mark.fault("answers of a server to requests that it has stored are lost")
@pytest.mark.parametrize("mode", ["stores, answers 500", "stores, breaks off"])
def test_lost_answers_register_nothing_twice(tmp_path: Path, server: Server, mode: str) -> None:
    name = mode.partition(", ")[2].replace(" ", "-")
    folder = finished_run(tmp_path / "run", register=name, experiment=name)
    proxy = Proxy(server.uri)
    proxy.mode = mode
    calls = 0  # each repeats the request whose answer was lost
    while not sync(folder, read_results, f"http://{proxy.address}").complete:
        calls += 1
        assert calls < 80
    asked = [request for request in proxy.asked if request.endswith("model-versions/create")]
    proxy.close()
    client = client_of(server.uri)
    count = len(HAND_WRITTEN["triage"]) + len(HAND_WRITTEN["animals"])
    assert len(asked) == 2 + count, "no request was repeated"
    for task in ("triage", "animals"):
        assert [v.tags["prompt"] for v in versions(client, f"{name}-{task}")] == [task]
        assert best(client, f"{name}-{task}").version == "1"
        written = versions(client, f"{name}-{task}-hand-written", IS_PROMPT)
        texts = [version.tags["mlflow.prompt.text"] for version in written]
        assert len(texts) == len(set(texts)) == len(HAND_WRITTEN[task])


def test_the_alias_moves_only_to_a_better_score_on_the_same_rows(
    tmp_path: Path, store: str
) -> None:
    """0.94 is the score of the first run; a change of the validation rows moves nothing."""
    client = client_of(store)
    cases = [("first", 0.94, True), ("better", 0.97, True), ("worse", 0.5, True)]
    for name, score, same_rows in [*cases, ("other rows", 0.99, False)]:
        folder = finished_run(tmp_path / name)
        _edit(folder / "summary.json", _scored(score))
        _edit(folder / "datasets.json", _rows(same_rows))
        sync(folder, read_results, store, "alias")
        version = best(client, "alias-triage")
        run_id = client.get_run(version.run_id).data.tags["mlflow.parentRunId"]
        expected = "first" if name == "first" else "better"
        assert client.get_run(run_id).info.run_name == expected, name


def _edit(path: Path, change: Callable[[Any], object]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def _scored(score: float) -> Callable[[Any], object]:
    return lambda summary: summary["prompts"]["triage"].update(validation_accuracy=score)


def _rows(same: bool) -> Callable[[Any], object]:
    return lambda entries: [e.update(digest=e["digest"] if same else "0" * 64) for e in entries]


def test_only_a_finished_run_is_registered(tmp_path: Path, store: str) -> None:
    folder = finished_run(tmp_path / "run", register="failed")
    write_results(folder, status="failed")
    assert sync(folder, read_results, store).complete
    assert client_of(store).search_registered_models("name LIKE 'failed%'") == []
    with pytest.raises(BadInput, match="--register: 'a/b' is not a name for a model"):
        sync(folder, read_results, store, register="a/b")
    plain = finished_run(tmp_path / "plain")
    with pytest.raises(BadInput, match="add --register NAME"):
        sync(plain, read_results, store, prompts=["triage"])


@pytest.fixture
def registered(tmp_path: Path, store: str) -> tuple[Path, str]:
    """A run on the tiny base, and the address of one of its registered prompts."""
    folder = save_run(tmp_path / "run")
    (folder / "predictions").mkdir()
    record = {"row": 1, "input": f"{ROWS[0]['text']}\nAnswer:", "prediction": "other"}
    (folder / "predictions" / "short.jsonl").write_text(json.dumps(record) + "\n")
    result = sync(folder, read_results, store, register="real")
    assert result.complete, result.message
    version = next(
        v for v in versions(client_of(store), "real-triage") if v.tags["prompt"] == "short"
    )
    return folder, f"models:/real-triage/{version.version}"


def test_mlflow_loads_a_registered_prompt(
    tmp_path: Path, store: str, registered: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It predicts as the run does, from files without the base's weights and without pickles."""
    import mlflow
    import pandas

    from trainer.api import load_base, load_run

    folder, uri = registered
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    local = Path(mlflow.artifacts.download_artifacts(uri))
    files = {path.relative_to(local).as_posix() for path in local.rglob("*") if path.is_file()}
    assert {"MLmodel", "run/run.yaml", "run/base.json"} <= files
    assert "run/prompts/short/adapter_model.safetensors" in files
    assert not [name for name in files if name.endswith((".pkl", ".pickle", ".bin", ".pt"))]
    assert sum((local / name).stat().st_size for name in files) < 100_000

    with load_base(load_run(folder)) as base:
        expected = base.score(ROWS, "short", use_targets=False)
    shutil.rmtree(folder)  # the model does not need the run
    model = mlflow.pyfunc.load_model(uri)
    frame = model.predict(pandas.DataFrame({"text": [row["text"] for row in ROWS]}))
    assert list(frame["prediction"]) == [made.prediction for made in expected]
    assert list(frame["log_probability"]) == pytest.approx(
        [made.log_probability for made in expected], rel=1e-5
    )
    assert set(frame["probabilities"][0]) == set(LABELS)
    assert model.metadata.load_input_example(str(local)).to_dict("records") == [
        {"text": ROWS[0]["text"]}
    ]
    model._model_impl._base.close()

    reference = json.loads((local / "run/base.json").read_text())
    assert (
        reference["model"] == yaml.safe_load((local / "run/run.yaml").read_text())["base"]["model"]
    )
    reference["digests"] = {"base.model, its weights": "0" * 64}
    (local / "run/base.json").write_text(json.dumps(reference))
    changed = mlflow.pyfunc.load_model(str(local))
    with pytest.raises(Exception, match="is not the base that the prompts were trained"):
        changed.predict(pandas.DataFrame({"text": ["A cough."]}))


def versions(client: Any, name: str, condition: str = "") -> list[Any]:
    """The versions of a registered model, the oldest first."""
    found = client.search_model_versions(
        f"name = '{name}'{condition}", order_by=["version_number ASC"]
    )
    return list(found)


def best(client: Any, name: str) -> Any:
    return client.get_model_version_by_alias(name, "best")
