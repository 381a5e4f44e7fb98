"""Checkpoints in FP8, MXFP4 and int8 are read like the dequantized model, block by block."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.random_base import VOCAB_SIZE, save_random
from benchmarks.unsharded_base import LocalSharder, load_shard, load_unsharded
from launch import preflight
from tests.family_bases import CASES, save_family
from tests.odd_folders import SINGLE
from tests.quantized_folders import (
    FORMATS,
    KEPT_INT8,
    READ_BY_TRANSFORMERS,
    declare,
    quantize_folder,
    write_mxfp4,
)
from tests.unit.test_like_transformers import our_loss
from trainer.commands.prepare import prepare
from trainer.config import Base
from trainer.data.token_table import Example
from trainer.model import tensor_locations
from trainer.model.checkpoint_files import open_base
from trainer.model.embedding_lookup import read_token_embeddings
from trainer.model.encodings import PackedInt8, PackedZeroPoints
from trainer.model.safetensors_reader import StoredTensor
from trainer.runtime.console import Console
from trainer.runtime.errors import BadInput

IDS = torch.randint(3, VOCAB_SIZE, (12,), generator=torch.Generator().manual_seed(3)).tolist()
ROW = Example.with_target(tuple(IDS), 5, 0)


def their_loss(folder: Path) -> float:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    labels = torch.tensor([[-100] * 5 + IDS[5:]])
    with torch.no_grad():
        return float(model(input_ids=torch.tensor([IDS]), labels=labels).loss)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family(tmp_path_factory.mktemp("plain") / "llama", "llama")


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family(tmp_path_factory.mktemp("experts") / "qwen3_moe", "qwen3_moe")


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = {**CASES["gpt_oss"][1], "hidden_size": 64, "num_hidden_layers": 2}
    root = tmp_path_factory.mktemp("mxfp4")
    folder = save_random(root / "plain", AutoConfig.for_model("gpt_oss", **settings))
    write_mxfp4(folder, root / "mxfp4")
    return root / "mxfp4"


def assert_same_shards(one: Path, other: Path, **settings: str) -> None:
    """Compare the bytes and row scales that ranks hold; a rank reads parts of rows."""
    for rank, ranks in ((0, 1), (1, 3)):
        (_, first, _), (_, second, _) = (
            load_shard(folder, rank, ranks, **settings) for folder in (one, other)
        )
        assert len(first.shards) == len(second.shards)
        assert all(map(torch.equal, first.shards, second.shards))
        assert all(map(torch.equal, first.scales, second.scales))


@pytest.mark.parametrize("case", ["plain", "experts"])
@pytest.mark.parametrize("form", FORMATS)
class TestFormat:
    @pytest.fixture
    def folders(
        self, request: pytest.FixtureRequest, tmp_path: Path, case: str, form: str
    ) -> tuple[Path, Path]:
        folders = tmp_path / "quantized", tmp_path / "dequantized"
        quantize_folder(request.getfixturevalue(case), FORMATS[form], *folders)
        return folders

    def test_shards_equal_those_of_the_dequantized_model(
        self, folders: tuple[Path, Path], form: str
    ) -> None:
        if form not in KEPT_INT8:
            assert_same_shards(*folders)
            assert_same_shards(*folders, quantization="none")

    def test_int8_values_are_kept(self, folders: tuple[Path, Path], case: str, form: str) -> None:
        stored = load_file(folders[0] / SINGLE)
        _, local, _ = load_shard(folders[0])
        name = "model.layers.0.self_attn.q_proj.weight"
        values = stored.get(name)
        if values is None:
            values = (stored[f"{name}_packed"].view(torch.uint8) ^ 128).view(torch.int8)
        values = values.flatten()
        kept = any(
            shard.dtype == values.dtype and torch.equal(shard, values) for shard in local.shards
        )
        assert kept == (form in KEPT_INT8)

    def test_loss_equals_that_of_transformers(self, folders: tuple[Path, Path], form: str) -> None:
        quantized, dequantized = folders
        expected = their_loss(dequantized)
        if form in READ_BY_TRANSFORMERS:
            assert their_loss(quantized) == pytest.approx(expected, abs=1e-5)
        kept = form in KEPT_INT8
        ours = our_loss(load_unsharded(quantized, "int8" if kept else "none"), ROW)
        assert ours == pytest.approx(expected, abs=1e-4)

    def test_prepared_equals_direct(self, folders: tuple[Path, Path], form: str) -> None:
        out, base = folders[0].parent / "int8", Base(model=str(folders[0]))
        console = Console(io.StringIO(), io.StringIO())
        if form in KEPT_INT8:
            with pytest.raises(BadInput, match="is in 8 bits already"):
                prepare(base, out, console)
        else:
            prepare(base, out, console)
            assert our_loss(load_shard(out)[0], ROW) == our_loss(load_shard(folders[0])[0], ROW)


def test_packed_rows_of_any_width() -> None:
    """Values, and zero points of any number of rows, in full words."""
    values = torch.arange(-128, -98, dtype=torch.int8).view(5, 6)
    padded = torch.zeros(8, 8, dtype=torch.uint8)
    padded[:5, :6] = values.view(torch.uint8) ^ 128
    by_row = StoredTensor(Path(), "I32", (5, 2), 0, 40)
    by_column = StoredTensor(Path(), "I32", (2, 6), 0, 48)
    raw = padded[:5].flatten(), padded[:, :6].reshape(2, 4, 6).transpose(1, 2).flatten()
    encodings = PackedInt8(by_row, 6), PackedZeroPoints(by_column)
    for encoding, data in zip(encodings, raw, strict=True):
        for start, stop in ((0, 5), (1, 2), (3, 5)):
            rows = encoding.rows(lambda _, a, b, data=data: data[a:b], start, stop)  # type: ignore[misc]
            assert torch.equal(rows, values[start:stop])


class TestMxfp4:
    def test_loss_equals_that_of_transformers(self, gpt_oss: Path) -> None:
        expected = their_loss(gpt_oss)
        assert our_loss(load_unsharded(gpt_oss, "none"), ROW) == pytest.approx(expected, abs=1e-4)

    def test_shards_equal_those_of_the_dequantized_model(
        self, gpt_oss: Path, tmp_path: Path
    ) -> None:
        model = AutoModelForCausalLM.from_pretrained(gpt_oss, dtype=torch.float32)
        model.save_pretrained(tmp_path, save_original_format=False)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (tmp_path / file).write_bytes((gpt_oss / file).read_bytes())
        assert_same_shards(gpt_oss, tmp_path)

    def test_prepared_equals_direct(self, gpt_oss: Path, tmp_path: Path) -> None:
        prepare(Base(model=str(gpt_oss)), tmp_path / "m", Console(io.StringIO(), io.StringIO()))
        assert our_loss(load_shard(tmp_path / "m")[0], ROW) == our_loss(load_shard(gpt_oss)[0], ROW)


class _LargestTensor(TorchDispatchMode):
    """Records the largest result of any operation, except shards and views of them."""

    def __init__(self) -> None:
        super().__init__()
        self.shards: set[int] = set()
        self.sizes: list[tuple[int, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not result.is_meta:
            storage = result.untyped_storage()
            self.sizes.append((storage.data_ptr(), storage.nbytes()))
        return result

    @property
    def largest(self) -> int:
        """In bytes."""
        return max(size for address, size in self.sizes if address not in self.shards)


@pytest.mark.parametrize("form", ["16 bits", "mxfp4", *FORMATS])
def test_loading_holds_one_block_besides_the_shard(
    plain: Path, gpt_oss: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """Blocks of 2 KiB in fp32; the largest weight of a layer has 12 KiB, the table 57 KiB."""
    folder = {"16 bits": plain, "mxfp4": gpt_oss}.get(form)
    if folder is None:
        folder = tmp_path / "quantized"
        quantize_folder(plain, FORMATS[form], folder, tmp_path / "dequantized")
    block = 2 << 10
    monkeypatch.setattr(tensor_locations, "BLOCK_BYTES", block)
    allocate = LocalSharder.allocate
    measured = _LargestTensor()

    def note(self: LocalSharder, *options: Any) -> Tensor:
        shard = allocate(self, *options)
        measured.shards.add(shard.untyped_storage().data_ptr())
        return shard

    monkeypatch.setattr(LocalSharder, "allocate", note)
    with measured:
        load_shard(folder, 1, 2)
    scales = 4 * VOCAB_SIZE  # a vector with an element per row
    assert 0 < measured.largest <= max(block, scales)


def test_embeddings_in_fp8_are_looked_up(plain: Path, tmp_path: Path) -> None:
    folders = tmp_path / "quantized", tmp_path / "dequantized"
    quantize_folder(plain, FORMATS["fp8 per row"], *folders, names=("proj", "embed"))
    ours, theirs = (
        read_token_embeddings(open_base(base), base, torch.float32, [5, 7])
        for base in (Base(model=str(folder)) for folder in folders)
    )
    assert torch.equal(ours, theirs)


class TestRefusals:
    @pytest.mark.parametrize(
        ("method", "stored"),
        [
            ({"quant_method": "awq", "bits": 4}, "awq"),
            ({"quant_method": "gptq", "bits": 4}, "gptq"),
            ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes (4 bits)"),
            ({"quant_method": "hqq"}, "hqq"),
            ({"bits": 4}, "an unknown format"),
            ({"quant_method": ["fp8"]}, "['fp8']"),
            (
                {
                    "quant_method": "compressed-tensors",
                    "format": "pack-quantized",
                    "config_groups": {"a": {"weights": {"num_bits": 4}}},
                },
                "compressed-tensors (4 bits)",
            ),
            (
                {
                    "quant_method": "compressed-tensors",
                    "config_groups": {"a": {"weights": {"num_bits": 8}}},
                    "sparsity_config": {"format": "sparse-24-bitmask"},
                },
                "compressed-tensors (sparse: sparse-24-bitmask)",
            ),
        ],
    )
    def test_other_formats(
        self, plain: Path, tmp_path: Path, method: dict[str, Any], stored: str
    ) -> None:
        folder = tmp_path / "m"
        quantize_folder(plain, FORMATS["int8 per row"], folder, tmp_path / "d")
        declare(folder, **method)
        with pytest.raises(BadInput) as refused:
            open_base(Base(model=str(folder)))
        (problem,) = refused.value.problems
        assert f"are stored in {stored}, not supported" in problem
        assert "use a release of the model in 16 bits or FP8" in problem
        assert list(preflight._model_config(folder, str(folder))) == [problem]

    def test_packed_weights_in_another_order_or_of_another_shape(
        self, plain: Path, tmp_path: Path
    ) -> None:
        folder, name = tmp_path / "m", "model.layers.0.self_attn.q_proj.weight"
        quantize_folder(plain, FORMATS["packed int8 per group"], folder, tmp_path / "d")
        tensors = load_file(folder / SINGLE)
        changes: dict[str, dict[str, Tensor]] = {
            "actorder": {f"{name}_g_idx": torch.zeros(48, dtype=torch.int32)},
            r"does not have 8 bits and shape \[48, 96\]": {f"{name}_shape": torch.tensor([48, 96])},
        }
        for message, change in changes.items():
            save_file(tensors | change, folder / SINGLE, {"format": "pt"})
            with pytest.raises(BadInput, match=message):
                open_base(Base(model=str(folder)))

    def test_missing_scales(self, plain: Path, tmp_path: Path) -> None:
        quantize_folder(plain, FORMATS["fp8 per row"], tmp_path / "m", tmp_path / "d")
        declare(tmp_path / "m", quant_method="fp8")
        tensors = load_file(tmp_path / "m" / SINGLE)
        name = "model.layers.0.self_attn.q_proj.weight"
        del tensors[f"{name}_scale"]
        save_file(tensors, tmp_path / "m" / SINGLE, {"format": "pt"})
        with pytest.raises(BadInput, match=f"its scales '{name}_scale_inv' are missing"):
            open_base(Base(model=str(tmp_path / "m")))
