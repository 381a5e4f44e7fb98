"""Base models named by a hub id: which files are downloaded, by which process, and the errors."""

from __future__ import annotations

import importlib
import io
import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from tests.hub_cache import COMMIT, TINY, fill_cache
from tests.thread_ranks import on_thread_ranks
from trainer.config import Base
from trainer.model import hub
from trainer.model.checkpoint_files import open_base
from trainer.runtime.console import Console
from trainer.runtime.errors import BadInput

#: As much of an HTTP response as huggingface_hub's errors read.
RESPONSE: Any = SimpleNamespace(headers={}, request=None)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


@pytest.mark.parametrize("download", [True, False])
@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_offline_the_cache_is_enough(cache: Path, download: bool, revision: str | None) -> None:
    snapshot = fill_cache(cache)
    files = open_base(Base(model="org/tiny", revision=revision), download=download)
    assert files.folder == snapshot
    assert files.name == "org/tiny"
    assert files.weight_files == [snapshot / "model.safetensors"]


def problem(model: str = "org/tiny", **settings: Any) -> str:
    with pytest.raises(BadInput) as refused:
        open_base(Base(model=model, **settings))
    (text,) = refused.value.problems
    assert "\n" not in text
    return text


def test_offline_and_not_in_the_cache(cache: Path) -> None:
    text = problem(revision="v2")
    assert text.startswith("base.model: 'org/tiny' is not a folder here")
    assert "HF_HUB_OFFLINE is set" in text
    assert text.endswith("hf download org/tiny --revision v2")


def test_a_name_that_is_no_hub_id(cache: Path) -> None:
    assert "'a b' is not a folder here" in problem("a b")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            GatedRepoError("403", response=RESPONSE),
            "gated on the hub: accept its terms on https://huggingface.co/org/tiny",
        ),
        (
            RepositoryNotFoundError("404", response=RESPONSE),
            "the hub has no such model; check the name, or set HF_TOKEN",
        ),
        (
            RevisionNotFoundError("404", response=RESPONSE),
            "base.revision: 'v2' is not a branch, tag or commit of 'org/tiny'",
        ),
        (
            OSError("No space left on device\nand more"),
            "could not be downloaded from the hub: OSError: No space left on device",
        ),
    ],
)
def test_hub_errors_are_reported_with_their_remedy(
    monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> str:
        raise error

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    text = problem(revision="v2")
    assert words in text
    assert "'org/tiny'" in text


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What is asked of a hub whose model has two weight files, and many other things."""
    folder = tmp_path / COMMIT
    folder.mkdir()
    for file in TINY.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).symlink_to(file)
    index = {"weight_map": {"a": "model-2.safetensors", "b": "model-1.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in set(index["weight_map"].values()):
        (folder / name).symlink_to(TINY / "model.safetensors")
    calls: list[dict[str, Any]] = []

    def download(name: str, **options: Any) -> str:
        calls.append({"name": name, **options})
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", download)
    return calls


def test_weights_come_last_and_are_those_of_the_index(asked: list[dict[str, Any]]) -> None:
    open_base(Base(model="org/tiny", revision="v2"))
    small, single, weights = asked
    assert small["revision"] == "v2"
    assert single["allow_patterns"] == ["model.safetensors"]  # transformers takes it if it is there
    assert not any("safetensors" in pattern for pattern in small["allow_patterns"])
    assert weights["revision"] == COMMIT  # the branch may have moved on in between
    assert weights["allow_patterns"] == ["model-1.safetensors", "model-2.safetensors"]
    assert {call["local_files_only"] for call in asked} == {False}
    assert {call["ignore_patterns"][0] for call in asked} == {"*/*"}


def test_what_is_not_supported_is_refused_before_its_weights_come(
    asked: list[dict[str, Any]], tmp_path: Path
) -> None:
    config = json.loads((TINY / "config.json").read_text()) | {"model_type": "mamba"}
    (tmp_path / COMMIT / "config.json").unlink()
    (tmp_path / COMMIT / "config.json").write_text(json.dumps(config))
    assert "mamba" in problem()
    assert len(asked) == 1


def test_download_progress_is_counted_in_bytes() -> None:
    """Through the library's own making of bars, which knows ours by their class."""
    messages: list[tuple[int, int]] = []
    hub_tqdm = importlib.import_module("huggingface_hub.utils.tqdm")
    bar_class = hub._bar(lambda done, total: messages.append((done, total)))
    for name in ("huggingface_hub.snapshot_download", "huggingface_hub.snapshot_download.transfer"):
        bar = hub_tqdm._create_progress_bar(
            cls=bar_class, log_level=0, name=name, total=0, initial=0, unit="B", unit_scale=True
        )
        bar.total += 100
        bar.refresh()
        bar.update(30)
        bar.update(70)
        bar.set_description("Reconstruction complete")
        bar.close()
    with bar_class(total=2, desc="Fetching 2 files") as files:
        files.update(1)
    assert set(messages) == {(0, 100), (30, 100), (100, 100)}


def test_a_person_sees_a_download_and_nothing_where_there_is_none() -> None:
    out = io.StringIO()
    console = Console(out, out)
    with console.downloading("org/tiny"):
        pass
    assert out.getvalue() == ""
    with console.downloading("org/tiny") as show:
        show(5_000_000, 20_000_000)
        show(9_000_000, 20_000_000)
    assert out.getvalue() == "downloading org/tiny (20.0 MB)\n"


def test_one_rank_of_each_node_works_and_the_others_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.distributed.collectives.POLL_SECONDS", 0.01)
    working: list[int] = []

    def program(engine: Any) -> Any:
        def work() -> str:
            threading.Event().wait(0.05 * (1 + engine.rank))  # many turns
            working.append(engine.rank)
            return f"by {engine.rank}"

        result = engine.run_on_each_node(work)
        return result, sorted(working)

    results = on_thread_ranks([0, 1, 0, 1], program)
    assert [result for result, _ in results] == ["by 0", None, "by 2", None]
    assert all(seen == [0, 2] for _, seen in results), "a rank went on before all had worked"


def test_a_node_that_fails_fails_all() -> None:
    def program(engine: Any) -> Any:
        def work() -> None:
            if engine.rank == 2:
                raise BadInput("base.model: 'org/tiny' is gated")

        return engine.run_on_each_node(work)

    assert on_thread_ranks([0, 1, 0, 1], program) == [["base.model: 'org/tiny' is gated"]] * 4


def test_results_of_all_ranks_reach_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.distributed.collectives.POLL_SECONDS", 0.01)

    def program(engine: Any) -> Any:
        def work() -> str:
            threading.Event().wait(0.02 * engine.rank)
            return f"by {engine.rank}"

        return engine.run_and_gather(work)

    assert on_thread_ranks([0, 1, 0], program) == [["by 0", "by 1", "by 2"]] * 3
