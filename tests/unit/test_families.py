"""Every family: packed and frozen against plain transformers, one row at a time."""

from __future__ import annotations

import copy
import functools
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from benchmarks.random_base import make_tokenizer
from benchmarks.unsharded_base import load_unsharded as load
from launch import preflight
from tests.family_bases import (
    CASES,
    errors,
    family_config,
    plain_model,
    problem,
    quantize_plain,
    randomize,
    row_by_row,
    save_family,
    with_text_around,
    with_virtual_tokens,
)
from tests.soft_prompts import soft_prompts
from trainer.config import Base
from trainer.evaluation.token_sampling import Sampling, ScoredToken
from trainer.inference.stream_batch import DecodingBatch, Join
from trainer.model.attention.padded import pad_rows
from trainer.model.checkpoint_files import open_base
from trainer.model.decode_step import DecodeStep
from trainer.model.families import (
    FAMILIES,
    FIRST_RELEASE,
    context_length,
    family_of,
    layer_sizes,
)
from trainer.model.layers.matmul_selection import use_matmul
from trainer.model.layers.moe import FrozenExperts
from trainer.model.meta_model import build_meta_model
from trainer.model.prompted_model import PromptedBase
from trainer.model.tensor_locations import RowReader, TensorLocation, locate_parameters
from trainer.model.unsupported_families import UNSUPPORTED
from trainer.packing import activation_memory
from trainer.packing.packed_batch import Segment, build_packed_batch
from trainer.packing.packed_row import PackedRow
from trainer.prompts.soft_prompt import VirtualTokens
from trainer.runtime.errors import BadInput

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def sliced_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head reads the 300 words in five slices."""
    monkeypatch.setattr(activation_memory, "LOGITS_BYTES", 1)
    monkeypatch.setattr(activation_memory, "MIN_COLUMNS", 64)


@pytest.fixture(scope="module")
def ours(family: Any) -> Callable[..., PromptedBase]:
    """Return a function that loads a case once per kind. Tests do not change these bases."""
    return functools.cache(
        lambda case, quantization, checkpointing=False: load(
            family(case), quantization, checkpointing
        )
    )


@pytest.fixture(scope="module")
def plain(family: Any) -> Callable[[str, str], Any]:
    """Return a function that loads the weights of a case in transformers once per kind."""

    @functools.cache
    def get(case: str, quantization: str) -> Any:
        if quantization == "none":
            return plain_model(family(case), "none")
        model = copy.deepcopy(get(case, "none"))
        quantize_plain(model)
        return model

    return get


def packed(
    base: PromptedBase, packed_rows: Sequence[PackedRow] = ()
) -> tuple[list[float], list[Tensor]]:
    """Mean loss per label of each prompt and its gradient, from one packed batch."""
    default_rows, prompts = problem(base.hidden_size)
    packed_rows = packed_rows or default_rows
    leaves = [prompt.requires_grad_() for prompt in prompts]
    batch = build_packed_batch(packed_rows, [len(leaf) for leaf in leaves])
    nll_N = base(batch, soft_prompts(leaves)).losses.loss_N
    losses = torch.stack([nll_N[batch.label_prompt_N == k].mean() for k in range(len(leaves))])
    losses.sum().backward()
    return losses.tolist(), [leaf.grad for leaf in leaves if leaf.grad is not None]


def test_every_family_of_the_table_is_compared():
    assert {model_type for model_type, _ in CASES.values()} == set(FAMILIES)


@pytest.mark.parametrize("case", CASES)
class TestFamily:
    @pytest.mark.parametrize(("quantization", "checkpointing"), [("int8", False), ("none", True)])
    def test_packed_equals_plain(
        self, ours: Any, plain: Any, case: str, quantization: str, checkpointing: bool
    ) -> None:
        base = ours(case, quantization, checkpointing)
        losses, gradients = packed(base)
        packed_rows, prompts = problem(base.hidden_size)
        expected, wanted = row_by_row(plain(case, quantization), packed_rows, prompts)
        assert losses == pytest.approx(expected, rel=1e-5)
        recurrent = FAMILIES[CASES[case][0]].recurrent  # padding changes the order of sums
        limit = 2e-5 if case == "gemma3n" else 1e-5  # 1.2e-5 on a CPU with AMX
        assert max(errors(gradients, wanted)) < (2e-4 if recurrent else limit)

    def test_virtual_tokens_inside_the_text_equal_plain(
        self, ours: Any, plain: Any, case: str
    ) -> None:
        base = ours(case, "int8")
        packed_rows, prompts = problem(base.hidden_size)
        packed_rows = with_text_around(packed_rows)
        losses, gradients = packed(base, packed_rows)
        expected, wanted = row_by_row(plain(case, "int8"), packed_rows, prompts)
        assert losses == pytest.approx(expected, rel=1e-5)
        recurrent = FAMILIES[CASES[case][0]].recurrent  # padding changes the order of sums
        assert max(errors(gradients, wanted)) < (2e-4 if recurrent else 1e-5)

    def test_a_diverged_prompt_does_not_change_the_others(self, ours: Any, case: str) -> None:
        base = ours(case, "int8")
        packed_rows, prompts = problem(base.hidden_size)
        prompts[0].fill_(torch.nan)
        leaves = [prompt.requires_grad_() for prompt in prompts]
        batch = build_packed_batch(packed_rows, [len(leaf) for leaf in leaves])
        nll_N = base(batch, soft_prompts(leaves)).losses.loss_N
        nll_N.sum().backward()
        assert nll_N[batch.label_prompt_N == 0].isnan().all()
        assert nll_N[batch.label_prompt_N == 1].isfinite().all()
        gradient = leaves[1].grad
        assert gradient is not None
        assert gradient.isfinite().all()

    def test_int8_products(self, family: Any, case: str) -> None:
        base = load(family(case), "int8")
        for router in base.modules():  # every expert, or rounding changes the experts of a token
            if hasattr(router, "top_k") and hasattr(router, "num_experts"):
                router.top_k = router.num_experts
        exact, wanted = packed(base)
        use_matmul(base, "int8", 0.0)
        with torch.compiler.set_stance("force_eager"):
            losses, gradients = packed(base)
        assert losses == pytest.approx(exact, rel=0.02)
        alike = [
            float(torch.cosine_similarity(a.flatten(), b.flatten(), 0))
            for a, b in zip(gradients, wanted, strict=True)
        ]
        least = 0.95 if FAMILIES[CASES[case][0]].recurrent else 0.98  # rounding accumulates
        assert all(least < cosine <= 1.001 for cosine in alike), alike
        assert min(alike) < 1 - 1e-7

    def test_bf16(self, family: Any, ours: Any, case: str) -> None:
        losses, gradients = packed(load(family(case), "int8", dtype=torch.bfloat16))
        exact, _ = packed(ours(case, "int8"))
        assert losses == pytest.approx(exact, rel=0.05)
        assert all(gradient.isfinite().all() for gradient in gradients)

    def test_decoding_equals_plain(self, ours: Any, plain: Any, case: str) -> None:
        """Two rows of different lengths behind a prompt, padded on the left, two steps."""
        base, model = ours(case, "none", True), plain(case, "none")
        packed_rows, prompts = problem(base.hidden_size)
        rows = [list(packed_row.example.input_ids) for packed_row in packed_rows[:2]]
        longest, prompt = max(map(len, rows)), prompts[1]
        pads = [longest - len(row) for row in rows]
        ids = torch.tensor([[0] * pad + row for pad, row in zip(pads, rows, strict=True)])
        mask = torch.tensor([[0] * pad + [1] * (longest + len(prompt) - pad) for pad in pads])
        cache = base.new_cache()
        with torch.no_grad(), base.unpacked():
            first = base(DecodeStep(ids, mask, cache), [VirtualTokens(prompt)]).logits_BV
            mask = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], dim=1)
            step = DecodeStep(torch.full((2, 1), 7), mask, cache)
            second = base(step, [VirtualTokens(prompt)]).logits_BV
            for i, row in enumerate(rows):
                inputs = with_virtual_tokens(model, torch.tensor([*row, 7]), prompt)
                wanted = model(**inputs, use_cache=False).logits[0]
                torch.testing.assert_close(first[i], wanted[-2], rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(second[i], wanted[-1], rtol=1e-4, atol=1e-4)

    def test_rows_that_join_and_leave_equal_plain(self, ours: Any, plain: Any, case: str) -> None:
        """Rows of several lengths, with one of two prompts or none, in one batch."""
        base, model = ours(case, "none", True), plain(case, "none")
        packed_rows, prompts = problem(base.hidden_size)
        batch = DecodingBatch(base, soft_prompts(prompts), CPU)
        inputs = [row.example.input_ids for row in packed_rows[:4]]
        prompt_of = [0, None, 1, 0]
        generated: dict[int, list[ScoredToken]] = {number: [] for number in range(4)}

        def forward(*numbers: int) -> None:
            joins = [
                Join(n, 0, tuple(inputs[n]), prompt_of[n], 0, 9, Sampling(top_logprobs=1))
                for n in numbers
            ]
            for number, token in batch.forward(joins).items():
                generated[number].append(token)

        with base.unpacked():
            for joining, leaving in [((0, 2), ()), ((), ()), ((1,), ()), ((), (0,)), ((3,), ())]:
                forward(*joining)
                for number in leaving:
                    batch.remove(number)
            for leaving in (1, 2, 3):
                forward()
                batch.remove(leaving)
        assert [len(generated[number]) for number in range(4)] == [3, 3, 5, 4]
        for number, tokens in generated.items():
            ids = torch.tensor([*inputs[number], *(token.token_id for token in tokens)])
            prompt = prompts[0][:0] if prompt_of[number] is None else prompts[prompt_of[number]]
            with torch.no_grad():
                logits = model(**with_virtual_tokens(model, ids, prompt), use_cache=False).logits[0]
            wanted = logits[-len(tokens) - 1 : -1].log_softmax(-1).amax(-1).tolist()
            assert [token.logprob for token in tokens] == pytest.approx(wanted, abs=1e-4)


class TestPaddedFallback:
    @pytest.mark.parametrize("case", ["llama", "gemma2"])
    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_padded_equals_packed(
        self, family: Any, monkeypatch: pytest.MonkeyPatch, case: str, checkpointing: bool
    ) -> None:
        losses, gradients = packed(load(family(case), "int8"))
        known = FAMILIES[model_type := CASES[case][0]]
        monkeypatch.setitem(FAMILIES, model_type, replace(known, packed=False))
        base = load(family(case), "int8", checkpointing)
        assert not base.packed
        actual, wanted = packed(base)
        assert actual == pytest.approx(losses, rel=1e-6)
        assert max(errors(gradients, wanted)) < 2e-6

    @pytest.mark.parametrize(
        "case", [case for case, (kind, _) in CASES.items() if FAMILIES[kind].recurrent]
    )
    def test_the_loss_of_a_row_does_not_depend_on_its_neighbors(
        self, family: Any, case: str
    ) -> None:
        """Also where a neighbor is longer, so that the row is padded, or holds NaN."""
        base = load(family(case), "none")
        rows, prompts = problem(base.hidden_size)

        def losses(chosen: Sequence[PackedRow], virtual: Sequence[Tensor]) -> Tensor:
            batch = build_packed_batch(chosen, [len(prompt) for prompt in virtual])
            return base(batch, soft_prompts(virtual)).losses.loss_N.detach()

        alone = [losses([row], prompts) for row in rows]
        torch.testing.assert_close(losses(rows, prompts), torch.cat(alone), rtol=1e-5, atol=1e-5)
        backwards = torch.cat(alone[::-1])
        torch.testing.assert_close(losses(rows[::-1], prompts), backwards, rtol=1e-5, atol=1e-5)

    def test_the_head_reads_labels_alone(
        self, family: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        base = load(family("mpt"), "int8")
        read: list[int] = []
        head = base.model.get_output_embeddings()
        forward = head.forward

        def note(x: Tensor, *options: Any) -> Any:
            read.append(x.numel() // x.shape[-1])
            return forward(x, *options)

        monkeypatch.setattr(head, "forward", note)
        packed_rows, _ = problem(base.hidden_size)
        packed(base)
        assert read == [sum(packed_row.example.num_labels for packed_row in packed_rows)]

    def test_layout(self) -> None:
        """A prompt of 2; a row of 3 behind it; a row of 4 behind nothing."""
        rows = pad_rows([Segment(2, 3, Segment(0, 2)), Segment(5, 4)], CPU)
        assert rows.token_BL.tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 8]]
        assert rows.mask_BL.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
        assert rows.position_BL.tolist() == [[0, 1, 2, 3, 4]] * 2
        assert rows.place_T[2:].tolist() == [2, 3, 4, 5, 6, 7, 8]


class TestCheckpointLayouts:
    """The same model, written down in every way that its family is found in."""

    @staticmethod
    def same(one: Path, other: Path) -> None:
        first, second = packed(load(one, "int8")), packed(load(other, "int8"))
        assert first[0] == second[0]
        assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))

    @staticmethod
    def rename(folder: Path, out: Path, change: Callable[[str], str | None]) -> Path:
        """A copy of a model's folder with other tensor names; None leaves a tensor out."""
        shutil.copytree(folder, out)
        file = out / "model.safetensors"
        renamed = {change(name): tensor for name, tensor in load_file(file).items()}
        save_file({name: t for name, t in renamed.items() if name is not None}, file)
        return out

    @pytest.mark.parametrize("case", ["mixtral", "qwen3_moe", "qwen2_moe", "olmoe"])
    def test_experts_one_by_one_and_stacked(self, tmp_path: Path, case: str) -> None:
        single = save_family(tmp_path / "single", case)
        stacked = save_family(tmp_path / "stacked", case, save_original_format=False)
        assert any(".experts.3." in name for name in load_file(single / "model.safetensors"))
        assert any(
            name.endswith("experts.gate_up_proj")
            for name in load_file(stacked / "model.safetensors")
        )
        self.same(single, stacked)

    @pytest.mark.parametrize("case", ["gpt2", "bloom", "opt", "llama"])
    def test_without_the_model_s_prefix(self, family: Any, tmp_path: Path, case: str) -> None:
        prefix = {"llama": "model.", "opt": "model."}.get(case, "transformer.")
        other = self.rename(family(case), tmp_path / "x", lambda name: name.removeprefix(prefix))
        assert load_file(other / "model.safetensors").keys() != (
            load_file(family(case) / "model.safetensors").keys()
        )
        self.same(family(case), other)

    def test_tied_weights_under_the_head_s_name(self, family: Any, tmp_path: Path) -> None:
        words = "model.embed_tokens.weight"
        other = self.rename(
            family("llama"),
            tmp_path / "x",
            lambda name: "lm_head.weight" if name == words else name,
        )
        self.same(family("llama"), other)

    @pytest.mark.parametrize("prefix", ["language_model.", "model.language_model."])
    def test_text_model_in_a_multimodal_checkpoint(
        self, family: Any, tmp_path: Path, prefix: str
    ) -> None:
        def move(name: str) -> str:
            if prefix == "language_model.":
                return prefix + name
            return prefix + name.removeprefix("model.")

        other = self.rename(family("gemma3"), tmp_path / "x", move)
        text = json.loads((other / "config.json").read_text())
        text.pop("architectures")
        config = {"model_type": "gemma3", "text_config": text}
        (other / "config.json").write_text(json.dumps(config))
        self.same(family("gemma3"), other)

    def test_gemma3_with_a_vision_tower_reads_text_equally(self, tmp_path: Path) -> None:
        """transformers' own multimodal class, saved as it saves itself."""
        vision = {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "image_size": 28,
            "patch_size": 14,
        }
        config = AutoConfig.for_model(
            "gemma3",
            text_config=family_config("gemma3").to_dict(),
            vision_config=vision,
            mm_tokens_per_image=4,
        )
        model = AutoModelForCausalLM.from_config(config).eval()
        assert hasattr(model.model, "vision_tower")
        randomize(model)
        model.save_pretrained(tmp_path)
        make_tokenizer().save_pretrained(tmp_path)
        base = load(tmp_path, "none")
        losses, gradients = packed(base)
        packed_rows, prompts = problem(base.hidden_size)
        expected, wanted = row_by_row(model, packed_rows, prompts)
        assert losses == pytest.approx(expected, rel=1e-5)
        assert max(errors(gradients, wanted)) < 1e-5

    def test_a_missing_expert_is_named(self, family: Any, tmp_path: Path) -> None:
        lost = "model.layers.1.mlp.experts.2.up_proj.weight"
        other = self.rename(
            family("qwen3_moe"), tmp_path / "x", lambda name: None if name == lost else name
        )
        with pytest.raises(BadInput, match=r"layers\.1\.mlp\.experts"):
            load(other, "int8")


class FlatFile:
    """Tensors read as flat ranges; counts elements."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors, self.elements = tensors, 0

    def read_flat(self, name: str, start: int, stop: int) -> Tensor:
        self.elements += stop - start
        return self.tensors[name].flatten()[start:stop]


def whole_parameter(source: TensorLocation, tensors: dict[str, Tensor]) -> Tensor:
    """What ``RowReader`` reads in parts: the rows of all tensors, end to end."""
    full = torch.cat([tensors[name] for name in source.tensors])
    return (full.mT if source.transposed else full).reshape(source.shape)


class TestRowReader:
    @pytest.mark.parametrize("case", ["gpt2", "gpt_oss", "mixtral", "bloom"])
    def test_rows_equal_rows_of_the_whole(self, family: Any, case: str) -> None:
        settings = Base(model=str(family(case)))
        files = open_base(settings)
        model = build_meta_model(files, settings, torch.float32, CPU)
        sources = locate_parameters(model, files.parameters, files.tensors)
        flat = FlatFile(load_file(family(case) / "model.safetensors"))
        for source in sources.values():
            full = whole_parameter(source, flat.tensors)
            tall = full if full.dim() == 1 else full.flatten(0, -2)
            third = len(tall) // 3
            rows = RowReader(source, flat)
            for start, stop in ((0, third), (third, 2 * third + 1), (2 * third + 1, len(tall))):
                assert torch.equal(rows.read(start, stop), tall[start:stop])

    def test_reads_only_the_rows_asked_for(self) -> None:
        flat = FlatFile({"a": torch.randn(4, 5), "b": torch.randn(4, 5)})
        rows = RowReader(TensorLocation(("a", "b"), torch.Size((8, 5))), flat)
        rows.read(3, 6)
        assert flat.elements == 3 * 5

    def test_a_transposed_expert_is_read_once(self) -> None:
        flat = FlatFile({"a": torch.randn(3, 5, 4)})
        rows = RowReader(TensorLocation(("a",), torch.Size((3, 4, 5)), transposed=True), flat)
        rows.read(4, 6)
        rows.read(6, 8)
        assert flat.elements == 4 * 5


class TestExperts:
    def test_int8_and_no_copy_kept_for_backward(self, family: Any) -> None:
        base = load(family("mixtral"), "int8")
        experts = [m for m in base.modules() if isinstance(m, FrozenExperts)]
        assert len(experts) == 2
        sizes = {p.numel() // len(p) for m in experts for p in m.parameters()}
        x = torch.randn(9, 48, requires_grad=True)
        kept: list[Tensor] = []

        def keep(tensor: Tensor) -> Tensor:
            kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            chosen = torch.tensor([[0, 3]] * 4 + [[1, 0]] * 5)
            experts[0](x, chosen, torch.rand(9, 2)).sum().backward()
        assert all(p.dtype == torch.int8 for p in experts[0].parameters())
        assert x.grad is not None
        assert not {tensor.numel() for tensor in kept} & sizes
        assert sum(t.numel() * t.element_size() for t in kept) < 9 * 2 * 64 * 4 * 8


class TestRefusals:
    @pytest.mark.parametrize(
        ("model_type", "reason"),
        [
            ("t5", "encoder-decoder"),
            ("reformer", "not been compared"),
        ],
    )
    def test_a_family_is_refused_by_name_before_weights(
        self, tmp_path: Path, model_type: str, reason: str
    ) -> None:
        AutoConfig.for_model(model_type).save_pretrained(tmp_path)
        with pytest.raises(BadInput, match=f"'{model_type}'.*{reason}"):
            open_base(Base(model=str(tmp_path)))

    def test_known_families_are_refused_before_ranks_start(self, tmp_path: Path) -> None:
        text = AutoConfig.for_model("t5")
        text.save_pretrained(tmp_path)
        (problem,) = preflight._model_config(tmp_path, "m")
        assert "of family 't5', which is not supported (an encoder-decoder" in problem
        assert not FAMILIES.keys() & UNSUPPORTED.keys()

    def test_a_release_that_lacks_a_family_is_refused_with_the_one_needed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(FIRST_RELEASE, "new", "99.1")
        monkeypatch.setitem(FIRST_RELEASE, "llama", "99.2")
        (tmp_path / "config.json").write_text('{"model_type": "new"}')
        with pytest.raises(
            BadInput, match=r"'new', which needs transformers 99\.1 or newer, but 5"
        ):
            open_base(Base(model=str(tmp_path)))
        container = {"model_type": "llava", "text_config": {"model_type": "new"}}
        (tmp_path / "config.json").write_text(json.dumps(container))
        with pytest.raises(
            BadInput, match=r"'new', which needs transformers 99\.1 or newer, but 5"
        ):
            open_base(Base(model=str(tmp_path)))
        with pytest.raises(BadInput, match=r"'llama', which needs transformers 99\.2"):
            family_of(family_config("llama"), "m")

    def test_every_family_that_the_installed_release_lacks_has_a_first_release(self) -> None:
        assert {kind for kind in FAMILIES if kind not in CONFIG_MAPPING} <= FIRST_RELEASE.keys()

    def test_a_variant_is_refused_with_its_setting(self) -> None:
        config = family_config("gemma3")
        config.use_bidirectional_attention = True
        with pytest.raises(BadInput, match="use_bidirectional_attention=True"):
            family_of(config, "m")

    def test_a_number_for_each_layer_counts_as_its_most(self) -> None:
        config = family_config("hunyuan_v1_moe")
        one = layer_sizes(config).experts_per_token
        config.num_experts_per_tok = [1, one + 1]
        assert layer_sizes(config).experts_per_token == one + 1


def test_context_ends_where_frequencies_would_change() -> None:
    assert context_length(family_config("phi3-longrope")) == 64
    assert context_length(family_config("phi3")) == 128
    assert context_length(family_config("bloom")) == 2048
