"""Resuming with a changed base, data or setting is refused by name before the base is loaded."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.hub_cache import TINY
from tests.unit.run_folder import checkpoint_state, save_checkpoint
from trainer.checkpointing.resume import find_checkpoint, run_identity, saved_positions
from trainer.config import RunConfig
from trainer.data.task_data import load_tasks
from trainer.model.checkpoint_files import open_base
from trainer.model.fingerprint import digest_file, digest_weight_files, fingerprint_base
from trainer.runtime.console import Console
from trainer.runtime.errors import BadInput

CONSOLE = Console(io.StringIO(), io.StringIO())


class Case:
    """A run file and its own copy of a base, which a test changes."""

    def __init__(self, folder: Path) -> None:
        self.base = folder / "base"
        shutil.copytree(TINY, self.base)
        self.rows = folder / "rows.jsonl"
        self.rows.write_text('{"text": "Takes insulin.", "label": "metabolic"}\n' * 3)
        self.run: dict[str, Any] = {
            "output_dir": str(folder / "run"),
            "base": {"model": str(self.base)},
            "tasks": [
                {
                    "name": "triage",
                    "train": str(self.rows),
                    "validation": str(self.rows),
                    "input": "{text}",
                    "target": " {label}",
                }
            ],
            "prompts": [{"name": "soft", "task": "triage", "num_virtual_tokens": 5}],
            "training": {"steps": 4},
        }
        self.dtype = "float32"

    def identity(self) -> dict[str, Any]:
        config = RunConfig.model_validate(self.run)
        files = open_base(config.base)
        tasks = load_tasks(config, files.tokenizer, files.context_length, files.config.vocab_size)
        return run_identity(config, fingerprint_base(files), self.dtype, tasks)

    def problems(self) -> list[str]:
        """Return the names of the settings that differ from the checkpoint."""
        with pytest.raises(BadInput) as refused:
            find_checkpoint(Path(self.run["output_dir"]), self.identity(), CONSOLE)
        *differences, remedy = refused.value.problems
        assert remedy.endswith("give another output_dir, or use --fresh to archive that run")
        assert all(", but the run in " in text and " started with " in text for text in differences)
        return [text.split(": is ")[0] for text in differences]


@pytest.fixture
def case(tmp_path: Path) -> Case:
    case = Case(tmp_path)
    state = checkpoint_state(2, case.identity())
    save_checkpoint(Path(case.run["output_dir"]) / "checkpoints", 2, {}, state, 1)
    return case


def weights(case: Case) -> None:
    """Flip one bit in the middle of the file; names, shapes and sizes stay the same."""
    path = case.base / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 1
    path.write_bytes(content)


def edit(path: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def tokenizer(case: Case) -> None:
    """Swap two tokens of the vocabulary."""

    def swap(content: Any) -> None:
        vocabulary = content["model"]["vocab"]
        first, second = list(vocabulary)[-2:]
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]

    edit(case.base / "tokenizer.json", swap)


def chat_template(case: Case) -> None:
    (case.base / "chat_template.jinja").write_text("{{ messages }}")


def config(case: Case) -> None:
    edit(case.base / "config.json", lambda content: content.update(rope_theta=12345.0))


def dtype(case: Case) -> None:
    """Resolve ``auto`` as on another device."""
    case.dtype = "bfloat16"


def template(case: Case) -> None:
    case.run["tasks"][0]["input"] = "{text} "


def length(case: Case) -> None:
    case.run["prompts"][0]["num_virtual_tokens"] = 6


def method(case: Case) -> None:
    case.run["prompts"][0]["method"] = "p_tuning"


def data(case: Case) -> None:
    case.rows.write_text('{"text": "Takes insulin", "label": "metabolic"}\n' * 3)


def chat_template_file(case: Case) -> None:
    path = case.base.with_name("own.jinja")
    path.write_text("{{ messages }}")
    case.run["base"]["chat_template"] = str(path)


CHANGES: list[tuple[Callable[[Case], None], set[str]]] = [
    (weights, {"base.model, its weights"}),
    (tokenizer, {"base.model, its tokenizer"}),
    (chat_template, {"base.model, its tokenizer", "base.model, its chat template"}),
    (chat_template_file, {"base.model, its chat template"}),
    (config, {"base.model, its config"}),
    (dtype, {"base.dtype"}),
    (template, {"tasks.triage.input"}),
    (length, {"prompts.soft.num_virtual_tokens"}),
    (method, {"prompts.soft.method"}),
    (data, {"data of triage, train", "data of triage, validation"}),
]


@pytest.mark.fault("resume with another base, tokenizer, dtype, length, template or method")
@pytest.mark.parametrize(("change", "named"), CHANGES, ids=[c.__name__ for c, _ in CHANGES])
def test_every_incompatible_change_is_named(
    case: Case, change: Callable[[Case], None], named: set[str]
) -> None:
    change(case)
    problems = set(case.problems())
    assert named <= problems
    # Another method also changes its own settings.
    assert all(text.startswith("prompts.soft.") for text in problems - named)
    assert problems == named or change is method


def test_compatible_changes_are_accepted(case: Case) -> None:
    """Paths, the split of a step into micro-batches, and evaluation settings."""
    moved = case.base.with_name("moved")
    case.base.rename(moved)
    case.run["base"]["model"] = str(moved)
    case.run["training"]["micro_batch_tokens"] = 77
    case.run["evaluation"] = {"every": 3}
    saved = find_checkpoint(Path(case.run["output_dir"]), case.identity(), CONSOLE)
    assert saved is not None
    assert saved.step == 2


def test_a_checkpoint_of_an_earlier_version_lacks_settings_with_their_default(case: Case) -> None:
    identity = case.identity()
    added = (".position", ".chat", ".optional")
    older = {k: v for k, v in identity.items() if not k.endswith(added)}
    assert len(older) == len(identity) - 3
    folder = Path(case.run["output_dir"]) / "checkpoints"
    save_checkpoint(folder, 3, {}, checkpoint_state(3, older), 1)
    saved = find_checkpoint(folder.parent, identity, CONSOLE)
    assert saved is not None
    assert saved.step == 3
    run = case.run | {"tasks": [case.run["tasks"][0] | {"chat": True}]}
    assert saved_positions(folder.parent, RunConfig.model_validate(run)) == {"soft": "front"}
    case.run["tasks"][0]["chat"] = True
    assert "tasks.triage.chat" in case.problems()


@pytest.mark.fault("pointer to the newest checkpoint is missing or garbled")
def test_missing_checkpoints_of_a_started_run_are_reported(tmp_path: Path) -> None:
    output = io.StringIO()
    assert find_checkpoint(tmp_path, {}, Console(output, output)) is None
    assert output.getvalue() == ""
    (tmp_path / "metrics.jsonl").write_text(
        '{"time": 1.0, "step": 120, "useful_tokens": 3, "prompt": null, "metrics": {}}\n'
    )
    assert find_checkpoint(tmp_path, {}, Console(output, output)) is None
    assert "120 step(s) were logged, but no checkpoint was saved" in output.getvalue()


def test_digests_of_large_files_are_cached_until_they_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROMPTSHARD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("trainer.model.fingerprint.MIN_CACHED_BYTES", 10)
    path = tmp_path / "model.safetensors"
    path.write_bytes(torch.arange(100).numpy().tobytes())
    first = digest_file(path)
    (place,) = (tmp_path / "cache" / "digests").iterdir()
    content = json.loads(place.read_text())
    assert content["sha256"] == first
    place.write_text(json.dumps(content | {"sha256": "remembered"}))
    assert digest_file(path) == "remembered"
    place.write_text("garbled")
    assert digest_file(path) == first
    path.write_bytes(torch.arange(1, 101).numpy().tobytes())  # as long as before
    assert digest_file(path) not in (first, "remembered")


def test_digests_are_read_from_the_hub_cache(tmp_path: Path) -> None:
    """The hub cache names a weight file after its SHA-256."""
    content = (TINY / "model.safetensors").read_bytes()
    name = digest_file(TINY / "model.safetensors")
    blob = tmp_path / "blobs" / name
    blob.parent.mkdir()
    blob.write_bytes(content[:10])  # its content is not read
    link = tmp_path / "model.safetensors"
    link.symlink_to(blob)
    assert digest_weight_files([link]) == {"model.safetensors": name}
