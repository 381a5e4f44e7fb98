"""Input refused before training: read-only folders, damaged bases, remote code."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from tests import preloaded
from tests.distributed.conftest import environments, wait
from tests.distributed.test_run import write_run_file
from tests.hub_cache import TINY
from trainer.config import Base
from trainer.model.checkpoint_files import open_base
from trainer.model.model_folder import INDEX
from trainer.runtime.errors import BadInput

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run_file(tmp_path_factory.mktemp("refused"))


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder that not even root can write to (a read-only mount if necessary)."""
    folder = tmp_path / "read-only"
    folder.mkdir(mode=0o555)
    if not os.access(folder, os.W_OK):
        yield folder
        return
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"root needs the right to mount, to see read-only: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.fault("output folder is read-only")
@pytest.mark.parametrize("module", ["trainer", "launch"])
def test_a_read_only_folder_is_refused_before_the_base_is_opened(
    run_file: Path, read_only: Path, tmp_path: Path, module: str
) -> None:
    """By a rank, before it imports torch, and by the command line."""
    (tmp_path / "torch.py").write_text("raise AssertionError('torch was loaded')\n")
    words = [str(run_file), f"output_dir={read_only / 'run'}"]
    if module == "trainer":
        words.append("base.model=/nowhere")
    done = subprocess.run(
        [sys.executable, "-m", module, *(["train"] if module == "launch" else []), *words],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"output_dir: cannot write to '{read_only / 'run'}'" in done.stderr or (
        f"output_dir: {read_only / 'run'}: {read_only} is not writable" in done.stderr
    )
    assert "give another folder" in done.stderr or "choose another folder" in done.stderr
    assert "nowhere" not in done.stderr


@pytest.fixture
def two_files(tmp_path: Path) -> Path:
    """The tiny base with its weights in two files and an index."""
    folder = tmp_path / "base"
    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = load_file(TINY / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def cut_short(base: Path) -> str:
    path = base / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    return f"error: {path}: is damaged"


def no_tensor(base: Path) -> str:
    path = base / "model-00002-of-00002.safetensors"
    tensors = load_file(path)
    name = next(name for name in sorted(tensors) if "mlp" in name)
    del tensors[name]
    save_file(tensors, path)
    return f"no weight file of {str(base)!r} has the tensor {name!r}; the model is incomplete"


@pytest.mark.fault("base file truncated, or tensor missing from its index")
@pytest.mark.parametrize("damage", [cut_short, no_tensor])
def test_a_damaged_base_ends_all_ranks_and_names_the_file(
    run_file: Path, two_files: Path, tmp_path: Path, damage: Callable[[Path], str]
) -> None:
    message = damage(two_files)
    logs = [tmp_path / f"{rank}.log" for rank in range(2)]
    words = [str(run_file), f"output_dir={tmp_path / 'run'}", f"base.model={two_files}"]
    processes = [
        preloaded.start("trainer", *words, environ=environ, stdout=log, stderr=None)
        for environ, log in zip(environments(2), logs, strict=True)
    ]
    try:
        wait(processes)
        codes = [process.wait(30) for process in processes]
    finally:
        for process in processes:
            process.kill()
    words_of_main = logs[0].read_text()
    assert codes == [2, 2], words_of_main
    assert message in words_of_main
    assert not (tmp_path / "run" / "run.yaml").exists(), "refused before anything was written"


PAYLOAD = """
import os
os.mkdir(os.environ["PAYLOAD"])
from transformers import PretrainedConfig
class Own(PretrainedConfig):
    model_type = "own"
"""


@pytest.mark.fault("base requires remote code")
@pytest.mark.parametrize("part", ["model", "tokenizer"])
def test_a_base_that_requires_remote_code_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    monkeypatch.setenv("PAYLOAD", str(tmp_path / "payload"))
    base = tmp_path / "base"
    shutil.copytree(TINY, base)
    (base / "own.py").write_text(PAYLOAD)
    file, change = {
        "model": ("config.json", {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}),
        "tokenizer": (
            "tokenizer_config.json",
            {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}},
        ),
    }[part]
    settings: dict[str, Any] = json.loads((base / file).read_text())
    (base / file).write_text(json.dumps(settings | change))
    with pytest.raises(BadInput, match="needs custom code, which is never executed"):
        open_base(Base(model=str(base)))
    assert not (tmp_path / "payload").exists()
