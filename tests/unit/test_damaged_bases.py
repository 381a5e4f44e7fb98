"""Damaged model folders: each is refused, at once, and never ends in another exception."""

from __future__ import annotations

import copy
import json
import random
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.random_base import llama_config, save_random
from tests.odd_folders import INDEX, SINGLE, shard
from trainer.config import Base
from trainer.model.checkpoint_files import open_base
from trainer.model.fingerprint import combine_digests
from trainer.model.meta_model import build_meta_model
from trainer.runtime.errors import BadInput

#: Values that no key of a model's JSON files expects.
ODD: list[Any] = [
    *(None, True, 0, -1, 3, 2**31, 2**63, 10**30, 1_000_000, 0.5, 1e308, float("nan")),
    *("", "text", "\0", "a" * 5000, [], [None], [[]], {}, {"a": 1}, [{"a": []}]),
]


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_random(tmp_path_factory.mktemp("m") / "m", llama_config(num_hidden_layers=1))
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    return folder


@pytest.fixture
def folder(healthy: Path, tmp_path: Path) -> Path:
    return shutil.copytree(healthy, tmp_path / "m")


def look(folder: Path) -> None:
    """All that a run does with a base's files before it reads weights."""
    settings = Base(model=str(folder))
    files = open_base(settings)
    assert files.fingerprint
    assert combine_digests(files, {})
    build_meta_model(files, settings, torch.float32, torch.device("cpu"))


def refusal(folder: Path) -> str:
    with pytest.raises(BadInput) as refused:
        look(folder)
    assert all("\n" not in problem for problem in refused.value.problems)
    return str(refused.value)


def change(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_the_healthy_folder_is_read(folder: Path) -> None:
    look(folder)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"head_dim": 2**31}, "config.json requires tables of 8.6 GB"),
        ({"num_hidden_layers": 1_000_000}, "num_hidden_layers: 1000000 is more than any model"),
        ({"num_hidden_layers": 90_000}, "requires more than"),
        ({"num_hidden_layers": 2}, "'model.layers.1.self_attn.q_proj.weight' (nor 8 more)"),
        ({"vocab_size": 2**31}, "config.json requires [2147483648, 64]"),
        ({"vocab_size": 2**40}, "config.json requires [1099511627776, 64]"),
        ({"intermediate_size": -1}, "transformers cannot read it"),
        ({"hidden_act": "none"}, "transformers cannot read it"),
        ({"rope_parameters": {"rope_type": "odd", "rope_theta": 1e4}}, "cannot read it: 'odd'"),
        ({"model_type": 3}, "model_type: 3 must be a string"),
        ({"model_type": "odd"}, "'odd', which is not supported (transformers "),
        ({"text_config": "odd"}, "the config of its text model is 'odd'"),
        ({"quantization_config": [1]}, "transformers cannot read it"),
        ({"quantization_config": {}}, "stored in an unknown format"),
        ({"auto_map": 3}, "transformers cannot read it"),
        ({"transformers_weights": "other.safetensors"}, "transformers_weights names other"),
    ],
)
def test_config(folder: Path, values: dict[str, Any], message: str) -> None:
    change(folder / "config.json", **values)
    assert message in refusal(folder)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("config.json", "[]", "must be a JSON object"),
        ("config.json", "{", "is not valid JSON"),
        ("tokenizer.json", "{", "tokenizer.json: is not valid JSON"),
        ("tokenizer.json", '{"version": "1.0"}', "transformers cannot read it"),
        ("tokenizer.json", "[" * 1000, "tokenizer.json: "),
        ("tokenizer_config.json", "3", "tokenizer_config.json: must be a JSON object"),
        ("generation_config.json", "[]", "generation_config.json: "),
        (SINGLE, "", "is damaged"),
        (SINGLE, "no header at all", "is damaged"),
    ],
)
def test_files(folder: Path, file: str, text: str, message: str) -> None:
    (folder / file).write_text(text)
    assert message in refusal(folder)


@pytest.mark.parametrize("value", ["long", [1], True])
def test_a_tensor_length_that_is_not_a_number_is_refused(folder: Path, value: Any) -> None:
    change(folder / "tokenizer_config.json", model_max_length=value)
    assert "tokenizer" in refusal(folder)


@pytest.mark.parametrize(
    "weight_map", [[], "text", {}, {"a": 3}, {"a": [SINGLE]}, {"a": "\0"}, {"a": "x" * 9000}, None]
)
def test_index(folder: Path, weight_map: Any) -> None:
    (folder / SINGLE).unlink()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert f"{folder / INDEX}: weight_map must map each tensor" in refusal(folder)


@pytest.mark.parametrize("file", [SINGLE, "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("kind", ["a link", "not a file"])
def test_paths_that_are_not_regular_files_are_refused(folder: Path, file: str, kind: str) -> None:
    (folder / file).unlink()
    if kind == "a link":
        (folder / file).symlink_to("/nowhere/else")
    else:
        (folder / file).mkdir()
    assert f"{folder / file}: is {kind}" in refusal(folder)


class TestTrueRemedies:
    """What a refusal says about a whole, but foreign, folder."""

    @staticmethod
    def rename(folder: Path, prefix: str) -> None:
        tensors = load_file(folder / SINGLE)
        save_file({prefix + name: tensor for name, tensor in tensors.items()}, folder / SINGLE)

    @pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.module."])
    def test_a_wrapper_s_prefix(self, folder: Path, prefix: str) -> None:
        self.rename(folder, prefix)
        text = refusal(folder)
        assert f"the prefix {prefix!r} of a wrapper" in text
        assert "remove the prefix from the names in the files" in text
        assert "download" not in text

    def test_a_classifier(self, tmp_path: Path) -> None:
        from transformers import LlamaForSequenceClassification

        config = llama_config(num_hidden_layers=1, tie_word_embeddings=False)
        folder = save_random(tmp_path / "m", config)
        LlamaForSequenceClassification(config).save_pretrained(folder)
        text = refusal(folder)
        assert "it is a LlamaForSequenceClassification, which has no language model head" in text

    def test_weights_of_another_model(self, folder: Path, tmp_path: Path) -> None:
        from tests.family_bases import save_family

        other = save_family(tmp_path / "gpt2", "gpt2")
        shutil.copyfile(other / SINGLE, folder / SINGLE)
        assert "config.json and weights belong to different models" in refusal(folder)

    def test_an_adapter_in_the_folder(self, folder: Path) -> None:
        (folder / "adapter_config.json").write_text("{}")
        assert "transformers would add this adapter" in refusal(folder)

    def test_a_folder_with_a_gguf_file(self, folder: Path) -> None:
        (folder / "m-q4.gguf").write_bytes(b"GGUF")
        (folder / "config.json").unlink()
        assert f"name the file itself: base.model: {folder / 'm-q4.gguf'}" in refusal(folder)

    def test_a_weight_file_in_place_of_its_folder(self, folder: Path) -> None:
        assert f"is a file; use its folder, {str(folder)!r}" in refusal(folder / SINGLE)


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if at:
        yield at
    if isinstance(value, dict | list):
        children = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in list(children)[:50]:
            yield from places(inner, (*at, key))


def mutated(value: Any, rng: random.Random) -> Any:
    """A JSON value in which one or two places hold something else, or nothing."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 2])):
        positions = list(places(value))
        if not positions:
            return rng.choice(ODD)
        *way, last = min(rng.sample(positions, min(2, len(positions))), key=len)
        box = value
        for key in way:
            box = box[key]
        if rng.random() < 0.75:
            box[last] = rng.choice(ODD)
        else:
            del box[last]
    return value


def damage(folder: Path, rng: random.Random) -> None:
    file = rng.choice(["config.json", "tokenizer.json", "tokenizer_config.json", INDEX, SINGLE])
    path = folder / file
    if file == INDEX:
        shard(folder, load_file(folder / SINGLE))
        (folder / SINGLE).unlink()
    if file == SINGLE:
        data = path.read_bytes()
        stop = 8 + int.from_bytes(data[:8], "little")
        header = json.dumps(mutated(json.loads(data[8:stop]), rng)).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + data[stop:])
    elif rng.random() < 0.8:
        path.write_text(json.dumps(mutated(json.loads(path.read_text()), rng)))
    else:
        data = bytearray(path.read_bytes())
        data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(bytes(data[: rng.choice([len(data), rng.randrange(len(data))])]))


def test_mutations(healthy: Path, tmp_path: Path) -> None:
    """Whatever is changed, the folder is read or refused with BadInput."""
    rng = random.Random(7)
    refused = 0
    for number in range(80):
        folder = shutil.copytree(healthy, tmp_path / str(number))
        damage(folder, rng)
        try:
            look(folder)
        except BadInput:
            refused += 1
        shutil.rmtree(folder)
    assert refused > 40
