"""A base in a GGUF file is the model that transformers dequantizes: weights, ids and losses."""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from benchmarks.unsharded_base import load_shard, load_unsharded
from launch import preflight
from tests.unit.test_like_transformers import (
    digests_of_ours,
    digests_of_theirs,
    our_loss,
    text_modules,
)
from tests.unit.test_quantized_bases import assert_same_shards
from trainer.commands.prepare import prepare
from trainer.config import Base
from trainer.data.token_table import Example
from trainer.model import gguf_header
from trainer.model.base_license import License, base_license
from trainer.model.checkpoint_files import open_base
from trainer.model.fingerprint import fingerprint_base
from trainer.runtime.console import Console
from trainer.runtime.errors import BadInput

pytest.importorskip("gguf")

from tests.gguf_files import ARCHITECTURES, K_QUANTS, WRITTEN, write_gguf

TEXT = "In the other, they are thinner."


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "llama.gguf", "llama", "Q4_1")


def assert_alike(path: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    base = load_unsharded(path, "none")
    ours = base.model
    assert digests_of_ours(ours) == digests_of_theirs(text_modules(theirs, ours))
    ids = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)(TEXT)["input_ids"]
    files = open_base(Base(model=str(path)))
    assert files.tokenizer(TEXT)["input_ids"] == ids
    labels = torch.tensor([[-100] * 5 + ids[5:]])
    expected = float(theirs(input_ids=torch.tensor([ids]), labels=labels).loss)
    row = Example.with_target(tuple(ids), 5, 0)
    assert our_loss(base, row) == pytest.approx(expected, abs=1e-4)
    assert files.generation.to_dict() == theirs.generation_config.to_dict()


@pytest.mark.parametrize("kind", [*WRITTEN, *K_QUANTS])
def test_type(tmp_path: Path, kind: str) -> None:
    path = write_gguf(tmp_path / "m.gguf", "llama", kind)
    assert_alike(path)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False])
def test_architecture(tmp_path: Path, architecture: str, tied: bool) -> None:
    assert_alike(write_gguf(tmp_path / "m.gguf", architecture, tie_word_embeddings=tied))


@pytest.mark.parametrize("tied", [True, False])
def test_parts(tmp_path: Path, tied: bool) -> None:
    """Three files are the model of one, also where the head is in the last."""
    options = {"tie_word_embeddings": tied}
    path = write_gguf(tmp_path / "m.gguf", "llama", "Q4_1", tensors_per_part=8, **options)
    whole = write_gguf(tmp_path / "whole" / "m.gguf", "llama", "Q4_1", **options)
    assert path.name == "m-00001-of-00003.gguf"
    assert list(preflight._gguf(path, str(path))) == []
    files, one = (open_base(Base(model=str(file))) for file in (path, whole))
    assert [file.name[2:7] for file in files.weight_files] == ["00001", "00002", "00003"]
    assert files.parameters.warnings == ()
    configs = [each.config.to_dict() for each in (files, one)]
    assert {**configs[0], "_name_or_path": ""} == {**configs[1], "_name_or_path": ""}
    assert_same_shards(path, whole)


def test_every_architecture_of_the_list_is_compared() -> None:
    assert set(ARCHITECTURES) == set(gguf_header.ARCHITECTURES)


@pytest.mark.parametrize("embeddings", ["keep", "int8"])
def test_prepared_equals_direct(llama: Path, tmp_path: Path, embeddings: str) -> None:
    out, settings = tmp_path / "m", {"embeddings": embeddings, "head": embeddings}
    base = Base.model_validate({"model": str(llama), **settings})
    prepare(base, out, Console(io.StringIO(), io.StringIO()))
    row = Example.with_target(tuple(range(3, 15)), 5, 0)
    assert our_loss(load_shard(out)[0], row) == our_loss(load_shard(llama, **settings)[0], row)
    tokenizers = [open_base(Base(model=str(path))).tokenizer for path in (out, llama)]
    assert tokenizers[0](TEXT) == tokenizers[1](TEXT)
    for path in (out, llama):
        assert base_license(Base(model=str(path)), path) == License("apache-2.0")


def test_shards_equal_those_of_the_saved_model(llama: Path, tmp_path: Path) -> None:
    """Ranks read parts of heads whose rows the file permutes."""
    options = {"gguf_file": llama.name}
    AutoTokenizer.from_pretrained(llama.parent, **options).save_pretrained(tmp_path)
    dequantize = GgufConfig(dequantize=True)
    AutoModelForCausalLM.from_pretrained(
        llama.parent, **options, dtype=torch.float32, quantization_config=dequantize
    ).save_pretrained(tmp_path)
    assert_same_shards(llama, tmp_path)


def test_digests_depend_on_the_file(llama: Path, tmp_path: Path) -> None:
    digests = []
    for change in (False, True):
        path = tmp_path / "m.gguf"
        data = bytearray(llama.read_bytes())
        data[-5] ^= change
        path.write_bytes(data)
        files = open_base(Base(model=str(path)))
        assert files.weight_files == [path]
        digests.append(fingerprint_base(files)["base.model, its weights"])
    assert digests[0] != digests[1]


class TestRefusals:
    @staticmethod
    def refusal(path: Path) -> str:
        with pytest.raises(BadInput) as refused:
            open_base(Base(model=str(path)))
        (problem,) = refused.value.problems
        assert list(preflight._gguf(path, str(path))) == [problem]  # before ranks start
        return problem

    def test_another_architecture(self, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gguf_header, "ARCHITECTURES", ("qwen2",))
        text = self.refusal(llama)
        assert "of architecture 'llama', which is not supported (supported: qwen2)" in text
        assert f"from_pretrained({str(llama.parent)!r}, gguf_file='llama.gguf'" in text

    def test_without_the_library(self, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "gguf", None)
        assert (
            "requires the package gguf; install it (pip install 'promptshard[gguf]')"
            in self.refusal(llama)
        )

    def test_parts(self, llama: Path, tmp_path: Path) -> None:
        path = write_gguf(tmp_path / "m.gguf", "llama", tensors_per_part=8)
        second = path.with_name("m-00002-of-00003.gguf")
        assert f"name its first: {path}" in self.refusal(second)
        shutil.copy(path, tmp_path / "renamed.gguf")
        assert "merge them first (llama-gguf-split --merge)" in self.refusal(
            tmp_path / "renamed.gguf"
        )
        second.unlink()
        assert "of which m-00002-of-00003.gguf is missing" in self.refusal(path)

    def test_a_type_that_the_library_cannot_read(
        self, llama: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: object) -> None:
            raise NotImplementedError

        monkeypatch.setattr("gguf.quants.dequantize", fail)
        assert "is stored as Q4_1, which cannot be read" in self.refusal(llama)

    @pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
    def test_a_truncated_file(self, llama: Path, tmp_path: Path, share: float) -> None:
        data = llama.read_bytes()
        path = tmp_path / "m.gguf"
        path.write_bytes(data[: int(share * len(data))])
        assert "is not a GGUF file that can be read" in self.refusal(path)

    def test_a_file_of_another_kind(self, tmp_path: Path) -> None:
        path = tmp_path / "m.gguf"
        path.write_text("no model")
        assert "GGUF" in self.refusal(path)
