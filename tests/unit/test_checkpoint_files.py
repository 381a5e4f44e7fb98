"""Reading weights: any number of ranks, 8-bit folders, and files that are not right."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.random_base import llama_config, save_random
from benchmarks.unsharded_base import load_shard
from tests.family_bases import save_family
from trainer.commands.prepare import prepare
from trainer.config import Base
from trainer.model.checkpoint_files import open_base
from trainer.model.layers.quantization import dequantize_rows, quantize_rows
from trainer.runtime.console import Console
from trainer.runtime.errors import BadInput

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random(tmp_path_factory.mktemp("base"), llama_config(num_hidden_layers=2))


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = llama_config(num_hidden_layers=1, tie_word_embeddings=False)
    return save_random(tmp_path_factory.mktemp("untied"), config)


def prepared(base: Path, out: Path, file_bytes: int = 10**9, **settings: str) -> Path:
    with (out.parent / "stdout").open("w") as stdout:
        console = Console(stdout, stdout)
        prepare(Base.model_validate({"model": str(base), **settings}), out, console, file_bytes)
    return out


def edit(base: Path, to: Path, **changes: torch.Tensor | None) -> Path:
    """A copy of a folder with other tensors; None removes one."""
    shutil.copytree(base, to)
    tensors = load_file(to / "model.safetensors")
    for name, tensor in changes.items():
        name = name.replace("__", ".")
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    return to


def refusal(folder: Path, **settings: str) -> str:
    with pytest.raises(BadInput) as refused:
        load_shard(folder, **settings)
    return str(refused.value)


@pytest.mark.parametrize("ranks", [2, 3, 7])
def test_shards_of_all_ranks_add_up_to_the_base(base: Path, ranks: int) -> None:
    _, full, stats = load_shard(base)
    parts = [load_shard(base, rank, ranks) for rank in range(ranks)]
    for i, tensor in enumerate(full.shards):
        joined = torch.cat([part.shards[i] for _, part, _ in parts])
        assert torch.equal(joined[: len(tensor)], tensor)
        assert not joined[len(tensor) :].any()  # padding
    for i, scales in enumerate(full.scales):
        together = torch.stack([part.scales[i] for _, part, _ in parts]).amax(0)
        assert torch.equal(together, scales)
    # Rows that two ranks share are read twice; rows of this model are large beside its tensors.
    assert max(read.bytes_read for _, _, read in parts) <= 1.1 * stats.bytes_read / ranks


def test_int8_rows_are_bitsandbytes_rows(base: Path) -> None:
    model = load_shard(base)[0].model
    stored = load_file(base / "model.safetensors")[UP]
    layer = model.model.layers[1].mlp.up_proj
    weight, absmax = quantize_rows(stored)
    assert torch.equal(layer.weight, weight)
    assert torch.equal(layer.absmax, absmax)


@pytest.mark.parametrize("ends", ["keep", "int8"])
@pytest.mark.parametrize("file_bytes", [10**9, 20_000])
def test_a_prepared_folder_is_the_same_base(
    base: Path, tmp_path: Path, ends: str, file_bytes: int
) -> None:
    policy = {"embeddings": ends, "head": ends}
    folder = prepared(base, tmp_path / "int8", file_bytes, **policy)
    assert (folder / "model.safetensors.index.json").exists() == (file_bytes < 10**9)
    direct, prepared_base = load_shard(base, **policy), load_shard(folder)
    ids = torch.arange(20)
    with torch.no_grad():
        expected = direct[0](ids, []).embeddings_TH
        assert torch.equal(prepared_base[0](ids, []).embeddings_TH, expected)
    for a, b in zip(direct[1].shards, prepared_base[1].shards, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(direct[0].buffers(), prepared_base[0].buffers(), strict=True):
        assert torch.equal(a, b)
    halves = load_shard(folder, 1, 2)[2].bytes_read
    assert halves < 0.75 * prepared_base[2].bytes_read


def test_transformers_loads_a_prepared_folder(untied: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM

    folder = prepared(untied, tmp_path / "int8")
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    ours = load_shard(folder)[0].model
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        layer = theirs.model.layers[0].get_submodule(name)
        own = ours.model.layers[0].get_submodule(name)
        assert torch.equal(layer.weight.data, own.weight)
        assert torch.equal(layer.weight.SCB, own.absmax)


def test_a_folder_that_transformers_saved_in_8_bits_loads(untied: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_8bit=True)
    theirs = AutoModelForCausalLM.from_pretrained(untied, quantization_config=config)
    theirs.save_pretrained(tmp_path / "bnb")
    AutoTokenizer.from_pretrained(untied).save_pretrained(tmp_path / "bnb")
    saved = load_file(tmp_path / "bnb" / "model.safetensors")
    ours = load_shard(tmp_path / "bnb")[0].model
    original = load_file(untied / "model.safetensors")
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        layer = ours.model.layers[0].get_submodule(name)
        path = f"model.layers.0.{name}"
        assert torch.equal(layer.weight, saved[f"{path}.weight"])
        assert torch.equal(layer.absmax, saved[f"{path}.SCB"])
        full = dequantize_rows(layer.weight, layer.absmax)
        assert (full - original[f"{path}.weight"]).abs().max() <= layer.absmax.max() / 200


def test_int8_embeddings_and_head_are_close_to_the_stored(untied: Path) -> None:
    model = load_shard(untied, embeddings="int8", head="int8")[0].model
    stored = load_file(untied / "model.safetensors")
    ids = torch.tensor([[5, 7, 299]])
    table = stored["model.embed_tokens.weight"]
    step = table.abs().amax(1).max() / 127
    assert model.model.embed_tokens.rows.dtype == torch.int8
    assert (model.get_input_embeddings()(ids) - table[ids]).abs().max() <= step / 2 * 1.01
    x = torch.randn(4, 64)
    wanted = x @ stored["lm_head.weight"].T
    assert (model.lm_head(x) - wanted).norm() <= 0.01 * wanted.norm()


def test_tied_embeddings_and_head_share_one_tensor(base: Path) -> None:
    model = load_shard(base, embeddings="int8", head="int8")[0].model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.absmax is model.model.embed_tokens.absmax
    assert "base.head: keep, but base.embeddings: int8" in refusal(base, embeddings="int8")


def test_quantising_twice_is_refused(base: Path, tmp_path: Path) -> None:
    folder = prepared(base, tmp_path / "int8")
    with pytest.raises(BadInput, match="in 8 bits already"):
        prepared(folder, tmp_path / "again")
    assert not (tmp_path / "again").exists()
    with pytest.raises(BadInput, match="already exists"):
        prepared(base, folder)


def test_a_failed_prepare_leaves_nothing(base: Path, tmp_path: Path) -> None:
    bad = load_file(base / "model.safetensors")[UP].clone()
    bad[-1, -1] = torch.inf
    with pytest.raises(BadInput, match=r"up_proj.weight' holds NaN or infinite"):
        prepared(edit(base, tmp_path / "bad", **{UP: bad}), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "stdout"]


def test_missing_scales_are_refused(base: Path, tmp_path: Path) -> None:
    folder = prepared(base, tmp_path / "int8")
    scales = UP.replace("weight", "SCB")
    message = refusal(edit(folder, tmp_path / "cut", **{scales: None}))
    assert f"{UP!r} is stored in 8 bits, but its row scales {scales!r} are missing" in message
    wrong = edit(folder, tmp_path / "wrong", **{scales: torch.ones(5)})
    assert f"{scales!r} has shape [5]" in refusal(wrong)


def test_a_layout_of_older_bitsandbytes_is_refused(base: Path, tmp_path: Path) -> None:
    folder = prepared(base, tmp_path / "int8")
    for number, name in enumerate(("row", "col32")):
        layout = torch.tensor(number, dtype=torch.uint8)
        edited = edit(folder, tmp_path / name, **{f"{UP}_format": layout})
        if name == "row":
            load_shard(edited)
        else:
            message = refusal(edited)
            assert f"{UP!r} is stored in a layout of older bitsandbytes" in message


def test_a_config_of_wrong_types_is_refused(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": "two"}))
    with pytest.raises(BadInput, match="num_hidden_layers"):
        open_base(Base(model=str(tmp_path / "base")))


def test_an_8_bit_folder_is_not_read_as_float(base: Path, tmp_path: Path) -> None:
    folder = prepared(base, tmp_path / "int8")
    assert "is stored in 8 bits, but would be loaded" in refusal(folder, quantization="none")
    assert "base.embeddings or base.head is int8" in refusal(
        base, quantization="none", embeddings="int8", head="int8"
    )


def test_a_file_cut_short_is_named(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "cut")
    path = tmp_path / "cut" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert f"{path}: is damaged" in refusal(tmp_path / "cut")


@pytest.mark.parametrize("case", ["gpt2", "mixtral", "gpt_oss"])
def test_transposed_and_stacked_weights_survive_8_bits(tmp_path: Path, case: str) -> None:
    """Conv1D matrices, one tensor per expert, and all experts in one transposed stack."""
    base = save_family(tmp_path / "base", case)
    folder = prepared(base, tmp_path / "int8")
    direct, again = load_shard(base), load_shard(folder)
    for a, b in zip(direct[1].shards, again[1].shards, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(direct[0].buffers(), again[0].buffers(), strict=True):
        assert torch.equal(a, b)
    parts = [load_shard(folder, rank, 3)[1].shards for rank in range(3)]
    for full, *pieces in zip(again[1].shards, *parts, strict=True):
        assert torch.equal(torch.cat(pieces)[: len(full)], full)
