"""A folder means to us what it means to transformers: ties, tensors, ids, losses, texts, ends.

``assert_alike`` compares one folder. It runs over every family of the table, and over folders whose
flags, names and files disagree; where it cannot be alike, the folder is refused.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoTokenizer,
    GenerationConfig,
)

from benchmarks.random_base import VOCAB_SIZE, llama_config, save_random
from benchmarks.unsharded_base import load_shard, load_unsharded
from tests.family_bases import CASES
from tests.odd_folders import (
    INDEX,
    SINGLE,
    Head,
    container,
    copy,
    edit_config,
    edit_tensors,
    plain,
    set_flags,
    set_head,
    shard,
)
from tests.one_rank import OneRank
from tests.tokenizers_of_families import BYTE_LEVEL, SENTENCE_PIECE, make_tokenizer
from trainer.commands.inspect.weights import int8_weights
from trainer.commands.prepare import prepare
from trainer.config import Base, Task
from trainer.data.token_table import Example
from trainer.data.tokenization.chat import DialogueEncoder
from trainer.data.tokenization.tokenizer import TextTokenizer
from trainer.evaluation.generation import generate
from trainer.evaluation.stop_criteria import StopCriteria
from trainer.model.checkpoint_files import BaseFiles, open_base
from trainer.model.families import FAMILIES
from trainer.model.prompted_model import PromptedBase
from trainer.packing.packed_batch import build_packed_batch
from trainer.packing.packed_row import PackedRow
from trainer.runtime.console import Console
from trainer.runtime.errors import BadInput

NEW_TOKENS = 4


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("folders")


def load_theirs(folder: Path) -> tuple[Any, set[str]]:
    """transformers' own model of a folder, and the parameters that it found no tensor for."""
    config = AutoConfig.from_pretrained(folder)
    kinds = (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM)
    kind = next(kind for kind in kinds if type(config) in kind._model_mapping)
    options: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True}
    family = FAMILIES.get(config.get_text_config().model_type)
    if family and family.cached_attention == "eager":  # as in tests.family_bases.plain_model
        options["attn_implementation"] = "eager"
    model, info = kind.from_pretrained(folder, **options)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model.eval().requires_grad_(False), info["missing_keys"]


def text_modules(theirs: Any, ours: Any) -> dict[str, Any]:
    """The text model without its head in transformers' class, and the head."""
    base = next(m for m in theirs.modules() if type(m) is type(ours.base_model))
    return {"base": base, "head": theirs.get_output_embeddings()}


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().float().contiguous().numpy().tobytes()).hexdigest()


def digests_of_ours(model: Any) -> dict[str, str]:
    """Of every parameter that holds values, in the layout that transformers keeps it in."""
    digests = {}
    for part, root in (("base", model.base_model), ("head", model.get_output_embeddings())):
        for path, module in root.named_modules():
            turned = getattr(module, "transposed", ()) or ()  # False in a convolution
            values = dict(module.named_parameters(recurse=False))
            if getattr(module, "rows", None) is not None:
                values["weight"] = module.rows
            for name, value in values.items():
                value = value.mT if name in turned else value
                digests[f"{part}.{path}.{name}"] = digest(value)
    return digests


def digests_of_theirs(modules: dict[str, Any]) -> dict[str, str]:
    return {
        f"{part}.{path}.{name}": digest(value)
        for part, root in modules.items()
        for path, module in root.named_modules()
        for name, value in module.named_parameters(recurse=False)
    }


def our_loss(base: PromptedBase, row: Example) -> float:
    with torch.no_grad():
        return float(
            base(build_packed_batch([PackedRow(row, None, 0)], []), []).losses.loss_N.mean()
        )


def assert_alike(folder: Path, *, writes: bool = True) -> bool:
    """Compare what we make of a folder with what transformers does; gives whether it is tied.

    Args:
        writes: also compare generated tokens, and the ids of texts.
    """
    theirs, missing = load_theirs(folder)
    assert not missing, "transformers made weights up"
    files, base = open_base(Base(model=str(folder))), load_unsharded(folder, "none")
    ours = base.model
    table, head = theirs.get_input_embeddings().weight, theirs.get_output_embeddings().weight
    tied = table is head
    assert ours.get_input_embeddings().tied == tied
    assert digests_of_ours(ours) == digests_of_theirs(text_modules(theirs, ours))
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCAB_SIZE, (12,), generator=generator).tolist()
    row = Example.with_target(tuple(ids), 5, 0)
    labels = torch.tensor([[-100] * 5 + ids[5:]])
    loss = float(theirs(input_ids=torch.tensor([ids]), labels=labels).loss)
    assert our_loss(base, row) == pytest.approx(loss, abs=1e-4)
    assert files.generation.to_dict() == theirs.generation_config.to_dict()
    if writes:
        assert our_tokens(base, files, ids) == their_tokens(theirs, ids)
        assert_ids_alike(files.tokenizer, AutoTokenizer.from_pretrained(folder))
    return tied


def our_tokens(base: PromptedBase, files: BaseFiles, ids: list[int]) -> list[int]:
    task = Task(name="t", train="-", input="{text}", target="{label}", append_eos=False)
    ending = StopCriteria.of(files.generation, files.tokenizer, task)
    return generate(OneRank(), base, ending, [ids], None, NEW_TOKENS)[0].ids  # type: ignore[arg-type]


def their_tokens(theirs: Any, ids: list[int]) -> list[int]:
    """What transformers' greedy ``generate`` writes, without its end mark."""
    given = torch.tensor([ids])
    mask = torch.ones_like(given)
    options = {"attention_mask": mask, "max_new_tokens": NEW_TOKENS, "do_sample": False}
    written = theirs.generate(given, **options)[0, len(ids) :].tolist()
    ends = theirs.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return written[:-1] if written[-1] in ends else written


#: Inputs and targets whose boundary tokenizers treat differently.
BOUNDARIES = [
    *(("Which topic?", " billing"), ("Which topic?\n", "billing"), ("[INST] a [/INST]", "yes")),
    *(('Say "', 'yes"'), ("Topic: ", "billing"), ("w7 w8", " w9 w10"), ("net", "work")),
]
TURNS = [
    *({"role": "user", "content": "Which topic?"}, {"role": "assistant", "content": "billing"}),
    *({"role": "user", "content": "And now?"}, {"role": "assistant", "content": "yes"}),
]


def assert_ids_alike(ours: Any, theirs: Any) -> None:
    """Compare the ids of rows with those of one text, where generation can read these."""
    encoder = TextTokenizer(ours)
    texts, targets = zip(*BOUNDARIES, strict=True)
    inputs = encoder.inputs(texts)
    assert inputs == [theirs(text)["input_ids"] for text in texts]
    target_ids, merged = encoder.targets(texts, inputs, targets)
    for i, (text, target) in enumerate(BOUNDARIES):
        full_ids = theirs(text + target)["input_ids"]
        assert merged[i] or inputs[i] + target_ids[i] == full_ids
        # Only where generation cannot read the tokens of the whole text they may differ from it.
        assert (
            not merged[i]
            or full_ids[: len(inputs[i])] != inputs[i]
            or theirs.unk_token_id in full_ids
        )
    if theirs.chat_template:
        dialogue = DialogueEncoder(ours)
        ids = theirs.apply_chat_template(TURNS, return_dict=True)["input_ids"]
        assert dialogue(TURNS).ids == ids
        how = {"add_generation_prompt": True, "return_dict": True}
        opening = theirs.apply_chat_template(TURNS[:3], **how)["input_ids"]
        assert dialogue.opening(TURNS[:3]) == opening
        assert ids[: len(opening)] == opening


def refusal(folder: Path) -> str:
    with pytest.raises(BadInput) as refused:
        load_unsharded(folder, "none")
    return str(refused.value)


def test_every_family_of_the_table_is_compared() -> None:
    assert {model_type for model_type, _ in CASES.values()} == set(FAMILIES)


@pytest.mark.parametrize("case", CASES)
def test_family(family: Any, case: str) -> None:
    assert_alike(family(case))


class TestTies:
    """The container's own flag decides; a stored head that differs stays apart."""

    @pytest.mark.parametrize("head", ["absent", "same", "different", "alone"])
    @pytest.mark.parametrize("flag", [True, False])
    @pytest.mark.parametrize("case", ["llama", "gemma", "gpt2", "bloom", "gpt_neox", "gpt_oss"])
    def test_plain(self, root: Path, tmp_path: Path, case: str, flag: bool, head: Head) -> None:
        folder = copy(plain(root, case), tmp_path / "m")
        set_flags(folder, flag)
        set_head(folder, head)
        if flag or head not in ("absent", "alone"):
            assert assert_alike(folder, writes=False) == (flag and head != "different")
        else:
            assert load_theirs(folder)[1]
            assert "set tie_word_embeddings to true there" in refusal(folder)

    @pytest.mark.parametrize("head", ["absent", "same", "different"])
    @pytest.mark.parametrize(
        ("top", "text"), [(True, False), (False, True), (True, True), (None, None)]
    )
    @pytest.mark.parametrize("kind", ["gemma3", "mistral3", "llava"])
    def test_container(
        self,
        root: Path,
        tmp_path: Path,
        kind: str,
        top: bool | None,
        text: bool | None,
        head: Head,
    ) -> None:
        """A flag that is not there has the default of the container's config class."""
        folder = copy(container(root, kind), tmp_path / "m")
        set_flags(folder, top, text)
        set_head(folder, head)
        if load_theirs(folder)[1]:
            assert "does not tie the head to the word embeddings" in refusal(folder)
        else:
            tied = assert_alike(folder, writes=head == "different")
            assert not (tied and head == "different")

    def test_a_container_that_leaves_out_what_its_text_model_does(self, root: Path) -> None:
        """Cohere 2 scales its logits; Aya Vision does not."""
        assert "use a release of the text model alone" in refusal(container(root, "aya_vision"))

    @pytest.mark.parametrize("kind", ["qwen2_audio", "gemma4", "llama4", "ministral3", "qwen3_5"])
    def test_other_containers(self, root: Path, kind: str) -> None:
        assert_alike(container(root, kind))
        assert open_base(Base(model=str(container(root, kind)))).parameters.warnings == ()

    def test_a_container_whose_vision_tower_needs_another_package(
        self, family: Any, tmp_path: Path
    ) -> None:
        """Gemma 3n's is of the package timm, which is not installed."""
        folder = copy(family("gemma3n"), tmp_path / "m")

        def wrap(config: dict[str, Any]) -> None:
            text = dict(config)
            config.clear()
            vision = {"model_type": "gemma3n_vision", "hidden_size": 16, "vocab_size": 128}
            audio = {"hidden_size": 16, "conf_num_hidden_layers": 1}
            config.update(model_type="gemma3n", text_config=text, vision_config=vision)
            config.update(audio_config=audio, tie_word_embeddings=True)

        def rename(tensors: dict[str, Tensor]) -> None:
            for name in [name for name in tensors if name.startswith("model.")]:
                inner = name.removeprefix("model.")
                tensors[f"model.language_model.{inner}"] = tensors.pop(name)
            tensors["model.vision_tower.timm_model.conv_stem.conv.weight"] = torch.zeros(4, 4)

        edit_config(folder, wrap)
        edit_tensors(folder, rename)
        row = Example.with_target(tuple(range(3, 15)), 5, 0)
        losses = [our_loss(load_unsharded(f, "none"), row) for f in (folder, family("gemma3n"))]
        assert losses[0] == losses[1]
        assert open_base(Base(model=str(folder))).parameters.warnings == ()

    @pytest.mark.parametrize("kind", ["gemma3", "llama4", "llava", "qwen3_5", "qwen3_vl"])
    def test_the_vision_tower_is_neither_read_nor_held(
        self, root: Path, family: Any, kind: str
    ) -> None:
        folder = family(kind) if kind == "qwen3_vl" else container(root, kind)
        base, _, stats = load_shard(folder)
        stored = load_file(folder / SINGLE)
        vision = [name for name in stored if re.search("visual|vision|projector", name)]
        assert len(vision) > 5
        text = sum(tensor.nbytes for name, tensor in stored.items() if name not in vision)
        assert stats.bytes_read == text
        held = [*base.parameters(), *(b for n, b in base.named_buffers() if n.endswith("rows"))]
        assert sum(tensor.numel() * 4 for tensor in held) == text

    def test_a_head_that_differs_is_reported(self, root: Path, tmp_path: Path) -> None:
        folder = copy(plain(root, "llama"), tmp_path / "m")
        set_head(folder, "different")
        files = open_base(Base(model=str(folder)))
        (warning,) = files.parameters.warnings
        assert "'lm_head.weight' is stored and differs" in warning
        assert not files.config.tie_word_embeddings


class TestFiles:
    """Which weight files are read."""

    def test_a_stale_index_beside_a_whole_file(self, root: Path, tmp_path: Path) -> None:
        folder = copy(plain(root, "llama"), tmp_path / "m")
        shard(folder, {n: t + 0.1 for n, t in load_file(folder / SINGLE).items()})
        assert_alike(folder)

    def test_shards(self, root: Path, tmp_path: Path) -> None:
        folder = copy(plain(root, "qwen3_moe"), tmp_path / "m")
        shard(folder, load_file(folder / SINGLE))
        (folder / SINGLE).unlink()
        assert_alike(folder)

    def test_an_index_that_names_the_wrong_shard(self, root: Path, tmp_path: Path) -> None:
        """transformers reads all tensors of all files that the index names."""
        folder = copy(plain(root, "llama"), tmp_path / "m")
        tensors = load_file(folder / SINGLE)
        files = [f"model-{number:05d}-of-00002.safetensors" for number in (1, 2)]
        shard(folder, tensors, index={"a": files[1], "b": files[0]})
        (folder / SINGLE).unlink()
        assert_alike(folder)

    def test_tensors_without_the_prefix_and_twice(self, root: Path, tmp_path: Path) -> None:
        """Of two tensors for one parameter the first in natural order is read."""
        folder = copy(plain(root, "gpt2"), tmp_path / "m")

        def change(tensors: dict[str, Tensor]) -> None:
            for name in [name for name in tensors if ".h.0." in name]:
                tensors[name.removeprefix("transformer.")] = tensors[name] + 0.2

        edit_tensors(folder, change)
        assert_alike(folder)

    def test_files_that_the_index_names_are_missing(self, root: Path, tmp_path: Path) -> None:
        folder = copy(plain(root, "llama"), tmp_path / "m")
        shard(folder, load_file(folder / SINGLE))
        (folder / SINGLE).rename(folder / "model-00001-of-00001.safetensors")
        (folder / "model-00001-of-00002.safetensors").unlink()
        text = refusal(folder)
        assert f"{folder / INDEX}: lists missing files" in text
        assert "copy or download the index that belongs to it" in text


CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ '[' + m.role + ']' + m.content + '[/]\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)


class TestTokenizers:
    """Ids of text, of what follows it, and of dialogues."""

    @pytest.mark.parametrize("kind", [*SENTENCE_PIECE, *BYTE_LEVEL])
    def test_kind(self, tmp_path: Path, kind: str) -> None:
        texts = [text + target for text, target in BOUNDARIES] + ["[user]a[/]\n[assistant]b"]
        tokenizer = make_tokenizer(kind, texts, specials=("[user]", "[assistant]", "[/]"))
        tokenizer.chat_template = CHAT
        config = llama_config(num_hidden_layers=1, vocab_size=len(tokenizer))
        folder = save_random(tmp_path / "m", config)
        tokenizer.save_pretrained(folder)
        assert_alike(folder)


class TestEnds:
    """Where generation ends."""

    @pytest.mark.parametrize("place", ["generation_config.json", "config.json"])
    def test_a_list_of_end_tokens(self, root: Path, tmp_path: Path, place: str) -> None:
        folder = copy(plain(root, "gemma"), tmp_path / "m")
        generator = torch.Generator().manual_seed(3)
        ids = torch.randint(3, VOCAB_SIZE, (12,), generator=generator).tolist()
        third = their_tokens(load_theirs(folder)[0], ids)[2]
        (folder / "generation_config.json").unlink(missing_ok=True)
        if place == "config.json":
            edit_config(folder, lambda config: config.update(eos_token_id=[1, third]))
        else:
            GenerationConfig(eos_token_id=[1, third]).save_pretrained(folder)
        assert_alike(folder)
        assert len(their_tokens(load_theirs(folder)[0], ids)) < 3


class TestPrepared:
    """A folder that ``prepare`` writes is the same base, to us and to transformers."""

    @pytest.mark.parametrize("ends", ["keep", "int8"])
    @pytest.mark.parametrize(
        ("flag", "head"), [(True, "same"), (True, "different"), (False, "same")]
    )
    def test_ends(self, root: Path, tmp_path: Path, flag: bool, head: Head, ends: str) -> None:
        folder = copy(plain(root, "llama"), tmp_path / "m")
        set_flags(folder, flag)
        set_head(folder, head)
        settings = {"embeddings": ends, "head": ends}
        with (tmp_path / "said").open("w") as stdout:
            console = Console(stdout, stdout)
            base = Base.model_validate({"model": str(folder), **settings})
            prepare(base, tmp_path / "int8", console)
        direct, again = load_shard(folder, **settings)[0], load_shard(tmp_path / "int8")[0]
        assert again.model.get_input_embeddings().tied == (flag and head == "same")
        ids = torch.arange(3, 15).tolist()
        row = Example.with_target(tuple(ids), 5, 0)
        assert our_loss(again, row) == our_loss(direct, row)
        stored = load_file(tmp_path / "int8" / SINGLE)
        assert ("lm_head.weight" in stored) == (not (flag and head == "same"))
        config = json.loads((tmp_path / "int8" / "config.json").read_text())
        assert config["tie_word_embeddings"] == (flag and head == "same")

    @pytest.mark.parametrize("head", ["same", "different"])
    def test_inspected(self, root: Path, tmp_path: Path, head: Head) -> None:
        folder = copy(plain(root, "llama"), tmp_path / "m")
        set_head(folder, head)
        base = Base.model_validate({"model": str(folder), "embeddings": "int8", "head": "int8"})
        groups = {weight.group for weight in int8_weights(open_base(base), base)}
        ends = {"embeddings and head"} if head == "same" else {"embeddings", "head"}
        assert groups == {"layer 0", "layer 1"} | ends
