"""Measurements of ``promptshard inspect RUN_DIR`` equal transformers, and each other."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel

from benchmarks.unsharded_base import load_unsharded
from tests import golden
from tests.one_rank import OneRank
from trainer.commands.inspect_prompts.measurements import measure
from trainer.commands.inspect_prompts.options import Options, parse
from trainer.commands.inspect_prompts.pruning import prune
from trainer.commands.inspect_prompts.results import _elicited, inspect_prompt, similarity
from trainer.commands.inspect_prompts.subjects import Subject, make_subject
from trainer.commands.inspect_prompts.table import show
from trainer.config import RunConfig
from trainer.data.task_data import TaskData, load_tasks
from trainer.data.token_table import Example
from trainer.evaluation.evaluator import Evaluator
from trainer.evaluation.inspection import elicitation
from trainer.evaluation.inspection.elicitation import (
    Description,
    _read_states,
    class_rate,
    decoder_layers,
    elicit,
    layer_choice,
)
from trainer.evaluation.inspection.embedding_space import (
    prompt_similarity,
    random_like,
    redundancy,
    scan_vocabulary,
)
from trainer.evaluation.inspection.leave_one_out import (
    largest_harmless,
    loss_change,
    nested_removals,
    without,
)
from trainer.evaluation.scoring import Request
from trainer.evaluation.statistics import Difference
from trainer.model.layers.linear import FrozenLinear
from trainer.model.prompted_model import PromptedBase
from trainer.packing.activation_memory import TokenBudget
from trainer.prompts.initial_prompts import INITIAL_FILE, load_initial, save_initial
from trainer.prompts.soft_prompt import PrefixKeyValues, SoftPrompt, VirtualTokens
from trainer.reporting.inspection import WAYWARDNESS, Inspection, PromptInspection
from trainer.runtime.console import Console

BASE = Path(__file__).resolve().parents[2] / "examples" / "tiny_base"
DATA = BASE.parent / "data"
CHOICES = {"triage": ["metabolic", "cardiac", "other"], "animals": ["plants", "meat", "insects"]}
#: Place of a useless virtual token in the trained prompt of the quickstart's task triage.
PLANTED = 4
TEXT = "What does this animal eat?"
ROWS = 40


@pytest.fixture(scope="module")
def base() -> PromptedBase:
    return load_unsharded(BASE, "int8")


@pytest.fixture(scope="module")
def reference(base: PromptedBase) -> PreTrainedModel:
    """The model of transformers with the dequantized weights of ``base``."""
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(BASE, **options).eval().requires_grad_(False)
    layers = dict(model.named_modules())
    for name, layer in base.model.named_modules():
        if isinstance(layer, FrozenLinear) and layer.absmax is not None:
            weight, scale = layer.matrix()
            assert scale is not None
            layers[name].weight.data = weight.float() * scale[:, None]
    return model


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(BASE)


@pytest.fixture(scope="module")
def config() -> RunConfig:
    tasks = [
        {
            "name": name,
            "train": str(DATA / f"{name}.train.jsonl"),
            "validation": str(DATA / f"{name}.valid.jsonl"),
            "input": "{text}\nAnswer:",
            "target": " {label}",
            "choices": CHOICES[name],
            "metric": "accuracy",
            "max_validation_rows": 64,
        }
        for name in CHOICES
    ]
    return RunConfig.model_validate(
        {
            "output_dir": "run",
            "base": {"model": str(BASE)},
            "tasks": tasks,
            "prompts": [{"name": n, "task": n, "num_virtual_tokens": 12} for n in CHOICES],
            "training": {"steps": 1},
        }
    )


@pytest.fixture(scope="module")
def tasks(config: RunConfig, tokenizer: Any) -> dict[str, TaskData]:
    return load_tasks(config, tokenizer, 512, len(tokenizer), splits=("validation",))


@pytest.fixture(scope="module")
def prompts(base: PromptedBase, tokenizer: Any) -> dict[str, SoftPrompt]:
    """A trained prompt with a useless token, and the tokens of an instruction as another one."""
    useful_PH = load_file(golden.TRIAGE_PROMPT)["prompt_embeddings"]
    noise_PH = random_like(useful_PH, torch.Generator().manual_seed(1))
    planted_PH = torch.cat([useful_PH[:PLANTED], noise_PH[:1], useful_PH[PLANTED:]])
    instruction = embed(base, tokenizer(TEXT)["input_ids"])
    return {"triage": VirtualTokens(planted_PH), "animals": VirtualTokens(instruction)}


@pytest.fixture(scope="module")
def prefix(base: PromptedBase) -> PrefixKeyValues:
    sizes = base.model.config
    shape = (3, sizes.num_hidden_layers, 2, sizes.num_key_value_heads, sizes.head_dim)
    return PrefixKeyValues(torch.randn(shape, generator=torch.Generator().manual_seed(2)))


def embed(base: PromptedBase, ids: Sequence[int]) -> Tensor:
    embedded = base(torch.tensor(list(ids)), []).embeddings_TH
    assert embedded is not None
    return embedded.float().detach()


@pytest.fixture(scope="module")
def evaluator(base: PromptedBase, tokenizer: Any) -> Evaluator:
    engine: Any = OneRank()
    return Evaluator(engine, base, tokenizer, TokenBudget(2000))


@pytest.fixture(scope="module")
def subjects(
    config: RunConfig,
    tasks: dict[str, TaskData],
    prompts: dict[str, SoftPrompt],
    prefix: PrefixKeyValues,
) -> dict[str, Subject]:
    """The trained prompt, an instruction of a single virtual token, and a prefix."""
    single = VirtualTokens(prompts["animals"].tensor[:1])
    triage, animals = config.prompts
    made = {
        "triage": make_subject(triage, tasks["triage"], prompts, prompts, config, ROWS, 512),
        "single": make_subject(animals, tasks["animals"], {"animals": single}, {}, config, 6, 512),
        "prefix": make_subject(
            animals, tasks["animals"], dict.fromkeys(CHOICES, prefix), {}, config, ROWS, 512
        ),
    }
    made["triage"].checkpoints = [(20, VirtualTokens(prompts["triage"].tensor[:2]))]
    return made


@pytest.fixture(scope="module")
def results(
    evaluator: Evaluator, tokenizer: Any, subjects: dict[str, Subject]
) -> dict[str, PromptInspection]:
    """All subjects, measured together; short texts of few layers are elicited."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(elicitation, "MOST_LAYERS", 2)
        patch.setattr(elicitation, "MAX_NEW_TOKENS", 6)
        console, chosen = Console(io.StringIO(), io.StringIO()), list(subjects.values())
        measured = measure(
            evaluator, chosen, lambda ids: embed(evaluator.base, ids), (), 512, console
        )
        pruned = prune(evaluator, chosen, measured, console)
    return {
        name: inspect_prompt(subject, own, None if s is None else s.result, tokenizer)
        for (name, subject), own, s in zip(subjects.items(), measured, pruned, strict=True)
    }


@pytest.fixture(scope="module")
def result(results: dict[str, PromptInspection]) -> PromptInspection:
    return results["triage"]


def losses(evaluator: Evaluator, subject: Subject, prompt: SoftPrompt | None) -> list[float]:
    """Score one prompt alone."""
    bank = [] if prompt is None else [prompt]
    (scored,) = evaluator.score([Request(subject.rows, 0 if bank else None)], bank)
    assert scored.nll_R is not None
    return scored.nll_R


class TestLosses:
    @pytest.mark.parametrize("name", ["triage", "prefix", "single"])
    def test_leave_one_out_equals_each_shorter_prompt_alone(
        self,
        evaluator: Evaluator,
        subjects: dict[str, Subject],
        results: dict[str, PromptInspection],
        name: str,
    ) -> None:
        """The only virtual token is compared with no prompt."""
        subject, inspected = subjects[name], results[name]
        full = losses(evaluator, subject, subject.values)
        for token in inspected.tokens[:: max(1, len(inspected.tokens) // 4)]:
            kept = [i for i in range(len(inspected.tokens)) if i != token.index]
            shorter = replace(subject.values, tensor=subject.values.tensor[kept]) if kept else None
            alone = losses(evaluator, subject, shorter)
            change = loss_change(alone, full, subject.rows.label_counts)
            measured = [token.leave_one_out, token.leave_one_out_low, token.leave_one_out_high]
            assert measured == pytest.approx([change.difference, change.low, change.high], abs=1e-5)

    def test_a_planted_useless_token_is_pruned(
        self, evaluator: Evaluator, subjects: dict[str, Subject], result: PromptInspection
    ) -> None:
        pruned = result.pruned
        assert pruned is not None
        assert PLANTED in pruned.dropped
        assert pruned.num_virtual_tokens == len(result.tokens) - len(pruned.dropped) >= 2
        assert (pruned.rows + pruned.chosen_on, result.rows) == (ROWS, ROWS)
        assert (pruned.score_before, pruned.score) == (1.0, 1.0)
        assert abs(pruned.difference) < 0.01, "on the other rows"
        values = subjects["triage"].values
        kept = [i for i in range(len(result.tokens)) if i not in pruned.dropped]
        shorter = losses(evaluator, subjects["triage"], VirtualTokens(values.tensor[kept]))
        assert sum(shorter) < 0.1 * ROWS, "the shorter prompt still solves the task"

    def test_few_rows_are_not_enough_to_prune(self, results: dict[str, PromptInspection]) -> None:
        assert results["single"].pruned is None
        assert any("not pruned" in note for note in results["single"].notes)


def test_the_largest_set_that_does_not_hurt_is_dropped() -> None:
    def change(low: float, difference: float) -> Difference:
        return Difference(difference, low, 2 * difference - low, 1.0, 0.0, "")

    changes = [change(0.1, 0.2), change(-0.1, 0.1), change(-0.3, -0.2), change(-0.2, 0.05)]
    sets = nested_removals(changes)
    assert sets == [[2], [2, 3], [2, 3, 1]]
    fine, worse = change(-0.1, 0.1), change(0.01, 0.1)
    assert largest_harmless(sets, [fine, fine, worse]).dropped == [2, 3]
    assert largest_harmless(sets, [worse, fine, fine]).dropped == []
    assert len(nested_removals([change(-1, 0)] * 3)[-1]) == 2, "one virtual token is kept"
    assert without(VirtualTokens(torch.zeros(1, 4)), {0}) is None


def read_by_transformers(
    model: PreTrainedModel, subject: Subject, prompt: Tensor | None, prefix: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the mean loss, and the attention [L, P] on the prompt of all label positions."""
    loss, shares, labels = torch.zeros(()), torch.zeros(()), 0
    size = len(subject.values.tensor)
    for right, candidates in zip(subject.rows.gold, subject.rows.candidates, strict=True):
        ids, start = torch.tensor(candidates[right].input_ids), candidates[right].target_start
        inputs, before, cache = model.get_input_embeddings()(ids), 0, DynamicCache()
        if prompt is not None:
            inputs, before = torch.cat([prompt, inputs]), size
        for layer in range(0 if prefix is None else prefix.shape[1]):
            assert prefix is not None
            key, value = prefix[:, layer].permute(1, 2, 0, 3)[:, None]
            cache.update(key, value, layer)
        output: Any = model(
            inputs_embeds=inputs[None], past_key_values=cache, output_attentions=True
        )
        at = torch.arange(start - 1, len(ids) - 1) + before
        loss = loss + cross_entropy(output.logits[0, at], ids[start:], reduction="sum")
        of_layers = torch.stack([layer[0].mean(0) for layer in output.attentions])
        shares = shares + of_layers[:, at, :size].sum(1).detach()
        labels += len(at)
    return loss / labels, shares / labels


@pytest.mark.parametrize("name", ["triage", "prefix"])
def test_attention_and_gradients_equal_transformers(
    reference: PreTrainedModel,
    subjects: dict[str, Subject],
    results: dict[str, PromptInspection],
    name: str,
) -> None:
    subject, inspected = subjects[name], results[name]
    values = subject.values.tensor.clone().requires_grad_()
    given = (None, values) if name == "prefix" else (values, None)
    loss, attention_LP = read_by_transformers(reference, subject, *given)
    assert inspected.loss == pytest.approx(loss.item(), abs=1e-5)
    (gradient,) = torch.autograd.grad(loss, values)
    product_P = (gradient * values).flatten(1).sum(1).tolist()
    assert [t.gradient_times_input for t in inspected.tokens] == pytest.approx(product_P, abs=1e-4)
    for token, of_layers in zip(inspected.tokens, attention_LP.T.tolist(), strict=True):
        assert token.attention == pytest.approx(of_layers, abs=1e-5)


def test_a_prefix_has_what_has_a_meaning(
    subjects: dict[str, Subject], results: dict[str, PromptInspection]
) -> None:
    inspected, values = results["prefix"], subjects["prefix"].values.tensor
    assert inspected.kind == "prefix"
    assert inspected.pruned is not None
    for i, token in enumerate(inspected.tokens):
        keys, norms = values[i].norm(dim=-1).mean(dim=(0, 2)).tolist()
        assert (token.key_norm, token.value_norm) == pytest.approx((keys, norms))
        assert None not in (token.leave_one_out, token.attention, token.gradient_times_input)
        assert (token.nearest, token.norm_percentile, token.drift) == ([], None, None)
    assert inspected.elicited is None
    assert inspected.controls.random is not None
    assert inspected.controls.random.loss is not None
    assert any("have no meaning for it" in note for note in inspected.notes)
    assert similarity({"prefix": subjects["prefix"].values}).prompts == []
    out = io.StringIO()
    show(Inspection(prompts={"prefix": inspected}), Console(out, io.StringIO()))
    assert WAYWARDNESS not in out.getvalue()
    assert "key norm" in out.getvalue()


class TestEmbeddingSpace:
    def test_nearest_tokens_and_norms(self, base: PromptedBase) -> None:
        table_VH = embed(base, range(base.vocab_size))
        vectors_NH = random_like(table_VH[:3], torch.Generator().manual_seed(0)) + table_VH[40:43]
        ids = [i for i in range(len(table_VH)) if i != 7]
        scan = scan_vocabulary(lambda chunk: embed(base, chunk), ids, vectors_NH, 4)
        cosine_NV = cosine_similarity(vectors_NH[:, None], table_VH[None], dim=-1)
        cosine_NV[:, 7] = -2
        product_NV = vectors_NH @ table_VH.T
        product_NV[:, 7] = -torch.inf
        for inspected, expected_NV in ((scan.cosine, cosine_NV), (scan.product, product_NV)):
            values, places = expected_NV.topk(4)
            assert [[i for i, _ in of_vector] for of_vector in inspected] == places.tolist()
            flat = [value for of_vector in inspected for _, value in of_vector]
            assert flat == pytest.approx(values.flatten().tolist(), abs=1e-5)
        norms = table_VH[ids].norm(dim=1)
        assert scan.mean_norm == pytest.approx(norms.mean().item())
        assert scan.percentile(norms.median().item()) == pytest.approx(50, abs=0.1)

    def test_a_word_is_its_own_nearest_token(
        self, tokenizer: Any, result: PromptInspection
    ) -> None:
        other = result.controls.other_task
        assert other is not None
        ids = tokenizer(TEXT)["input_ids"]
        assert [near.token for near in other.nearest] == [tokenizer.decode([i]) for i in ids]
        assert {round(near.cosine, 4) for near in other.nearest} == {1.0}
        assert {token.drift for token in result.tokens} == {0.0}, "it is its own start here"

    def test_redundancy_and_similarity(self) -> None:
        prompt = torch.tensor([[1.0, 0], [0, 2], [3, 0.1]])
        assert [i for i, _ in redundancy(prompt)] == [2, 2, 0]
        assert redundancy(prompt[:1]) == []
        (_, ab), (ba, bb) = prompt_similarity([prompt, prompt[:1]])
        expected = cosine_similarity(prompt.mean(0), prompt[0], dim=0).item()
        assert (ab, ba, bb) == pytest.approx((expected, expected, 1.0))

    def test_a_random_control_has_the_norms_of_the_prompt(self) -> None:
        prompt = torch.tensor([[1.0, 2, 2], [0, 0, 5]])
        drawn = random_like(prompt, torch.Generator().manual_seed(0))
        assert drawn.norm(dim=1).tolist() == pytest.approx([3, 5])


class TestElicitation:
    def test_class_rate_counts_whole_words(self) -> None:
        classes = ["not spam", "spam", "other"]
        assert class_rate("Spam, or NOT spam?", classes) == pytest.approx(2 / 3)
        assert class_rate("another one", classes) == 0
        assert class_rate("", classes) == 0

    def test_all_layers_of_a_small_base_are_tried(self) -> None:
        assert layer_choice(4) == [0, 1, 2, 3]
        assert layer_choice(2) == [0, 1]
        assert layer_choice(30) == [0, 10, 19, 29]

    def test_equals_transformers_with_hooks(
        self,
        evaluator: Evaluator,
        reference: PreTrainedModel,
        tokenizer: Any,
        subjects: dict[str, Subject],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Prompts of different lengths, in one batch."""
        monkeypatch.setattr(elicitation, "MOST_LAYERS", 2)
        monkeypatch.setattr(elicitation, "MAX_NEW_TOKENS", 6)
        values = [subjects[name].values.tensor for name in ("triage", "single")]
        example = subjects["triage"].rows.candidates[0][0]
        described = elicit(
            evaluator, list(map(VirtualTokens, values)), [example] * 2, ["Name it."], 512
        )
        for prompt_PH, descriptions in zip(values, described, strict=True):
            assert len(descriptions) == 8
            for inspected in descriptions:
                begin = "Name it. |" if inspected.with_examples else ""
                expected = patched(reference, tokenizer, prompt_PH, begin, inspected.layers)
                assert inspected.text == expected

    def test_states_of_a_prompt_inside_text(
        self, evaluator: Evaluator, reference: PreTrainedModel, subjects: dict[str, Subject]
    ) -> None:
        """The text before the virtual tokens is read, as in training."""
        prompt = VirtualTokens(subjects["triage"].values.tensor)
        example = Example((5, 6, 7, 8, 9, 10), ((4, 6),), 0, prompt_at=2, prompt_end=3)
        layers = decoder_layers(evaluator.base)[1:3]
        (states,) = _read_states(evaluator, [prompt], [example], layers)
        words = reference.get_input_embeddings()(torch.tensor([5, 6]))
        inputs = torch.cat([words, prompt.tensor])[None]
        with torch.no_grad():
            read: Any = reference(inputs_embeds=inputs, output_hidden_states=True)
        for layer, states_PH in zip((1, 2), states, strict=True):
            expected_PH = read.hidden_states[layer][0, 2:]
            torch.testing.assert_close(states_PH, expected_PH, rtol=1e-4, atol=1e-4)

    def test_a_text_that_does_not_fit_is_left_out(
        self, evaluator: Evaluator, subjects: dict[str, Subject]
    ) -> None:
        values = VirtualTokens(subjects["single"].values.tensor)
        example = subjects["triage"].rows.candidates[0][0]
        assert elicit(evaluator, [values], [example], ["Name it."], 8) == [[]]

    def test_the_best_text_is_kept(self, result: PromptInspection) -> None:
        assert result.elicited is not None
        assert result.class_rate == class_rate(result.elicited, CHOICES["triage"])
        assert result.class_rate is not None
        assert result.mean_class_rate is not None
        assert result.class_rate >= result.mean_class_rate

    def test_without_classes_there_is_no_rate(self) -> None:
        texts = [
            Description((source, target), with_examples, f"{source} {target} {with_examples}")
            for with_examples in (False, True)
            for source in (0, 1, 3)
            for target in (0, 3)
        ]
        assert _elicited(texts, None) == {
            "elicited": "1 0 True",
            "layers": (1, 0),
            "with_examples": True,
        }
        assert _elicited([], ["yes"]) == {}


@torch.no_grad()
def patched(
    model: PreTrainedModel, tokenizer: Any, prompt_PH: Tensor, begin: str, layers: tuple[int, int]
) -> str:
    """Read the prompt, replace the placeholders' states, and generate greedily without a cache."""
    read: Any = model(inputs_embeds=prompt_PH[None], output_hidden_states=True)
    states_PH = read.hidden_states[layers[0]][0]
    ids = list(tokenizer(begin)["input_ids"])
    start = len(ids)
    ids += tokenizer(" x", add_special_tokens=False)["input_ids"][-1:] * len(prompt_PH)
    stop = len(ids)

    def replace(module: Any, arguments: Any, named: Any) -> Any:
        hidden = arguments[0].clone()
        hidden[0, start:stop] = states_PH
        return (hidden, *arguments[1:]), named

    hook = model.model.layers[layers[1]].register_forward_pre_hook(replace, with_kwargs=True)
    for _ in range(6):
        token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        ids.append(token)
        if "|" in tokenizer.decode(ids[stop:]):
            break
    hook.remove()
    text = str(tokenizer.decode(ids[stop:], skip_special_tokens=True))
    return text.split("|")[0].strip()


def test_controls_are_beside_the_prompt(result: PromptInspection) -> None:
    controls = result.controls
    for control in (controls.random, controls.initial, controls.other_task):
        assert control is not None
        assert control.loss is not None
        assert control.class_rate is not None
        assert control.nearest
    assert controls.initial is not None
    assert controls.initial.loss == pytest.approx(result.loss, abs=1e-5)
    assert controls.other_task is not None
    assert controls.other_task.prompt == "animals"
    assert [saved.step for saved in result.checkpoints] == [20]
    assert result.checkpoints[0].loss is not None


def test_initial_prompts_are_read_again(
    tmp_path: Path, config: RunConfig, prompts: dict[str, SoftPrompt]
) -> None:
    assert load_initial(tmp_path, config) == {}
    save_initial(tmp_path, prompts)
    initial = load_initial(tmp_path, config)
    assert initial.keys() == prompts.keys()
    for name, values in prompts.items():
        assert torch.equal(initial[name].tensor, values.tensor)
    (tmp_path / INITIAL_FILE).write_bytes(b"damaged")
    assert load_initial(tmp_path, config) == {}


def test_unknown_start_and_single_task_are_noted(
    config: RunConfig, tasks: dict[str, TaskData], prompts: dict[str, SoftPrompt]
) -> None:
    prompt, alone = config.prompts[0], {"triage": prompts["triage"]}
    subject = make_subject(prompt, tasks["triage"], alone, {}, config, 8, 512)
    assert set(subject.controls) == {"random"}
    assert [note.partition(":")[0] for note in subject.notes] == [
        "the initial prompt is not known",
        "no control of another task",
    ]
    long = prompts | {"animals": VirtualTokens(prompts["animals"].tensor.repeat(9, 1))}
    subject = make_subject(prompt, tasks["triage"], long, {}, config, 8, 60)
    assert not subject.controls["other_task"].fits


def test_the_table_fits_80_columns(
    result: PromptInspection, prompts: dict[str, SoftPrompt]
) -> None:
    names = ("triage", "a-much-longer-name-of-a-prompt-in-a-sweep-lr0.003")
    inspection = Inspection(prompts=dict.fromkeys(names, result), similarity=similarity(prompts))

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    console = Console(out, io.StringIO())
    console._out.width = 80
    show(inspection, console)
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).rstrip() for line in out.getvalue().splitlines()]
    assert [line for line in lines if len(line) > 80] == []
    text = " ".join(" ".join(lines).split())
    assert WAYWARDNESS in text
    for label in ("random prompt, equal norms", "initial prompt", "other task: animals"):
        assert text.count(label) >= 3, "loss and rate, nearest tokens, elicited text"


def test_keys_of_the_json(result: PromptInspection) -> None:
    content = json.loads(json.dumps(result.model_dump(mode="json"), allow_nan=False))
    token = content["tokens"][0]
    assert set(token["nearest"][0]) == {"token", "cosine"}
    assert len(token["attention"]) == 4


def test_options_are_read_again(tmp_path: Path) -> None:
    options = Options(
        tmp_path, ("a", "-b"), "rows.jsonl", 9, ("-one", "two: x"), prune=True, json="-"
    )
    assert parse(options.arguments()) == options
    assert parse([str(tmp_path)]) == Options(tmp_path)
