"""The arms of ``promptshard evaluate`` equal transformers and PEFT on the same int8 weights."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks.unsharded_base import load_unsharded
from tests.one_rank import OneRank
from trainer.commands.evaluate.arm import Arm
from trainer.commands.evaluate.arms import ArmBuilder
from trainer.commands.evaluate.options import Options
from trainer.commands.evaluate.rows import RowEncoder
from trainer.commands.evaluate.scoring import ArmScorer
from trainer.commands.evaluate.similar_rows import cosine_similar
from trainer.commands.evaluate.store import PredictionStore
from trainer.config import RunConfig
from trainer.data.task_data import load_tasks
from trainer.data.tokenization.tokenize import no_progress
from trainer.evaluation.evaluator import Evaluator
from trainer.evaluation.metric_sums import row_sums
from trainer.evaluation.prediction_files import files_in
from trainer.evaluation.read_texts import mean_hidden_states
from trainer.model.layers.linear import FrozenLinear
from trainer.model.prompted_model import PromptedBase
from trainer.model.weight_adapter import check_layers, load_tensors
from trainer.packing.activation_memory import TokenBudget
from trainer.prompts.adapter_files import PromptAdapter, WeightAdapter, read_adapter
from trainer.prompts.peft_adapter import load_peft, save_peft
from trainer.prompts.soft_prompt import VirtualTokens
from trainer.runtime.console import Console
from trainer.runtime.errors import BadInput

BASE = Path(__file__).resolve().parents[2] / "examples" / "tiny_base"
CHOICES = ["plants", "meat", "insects"]
TEXTS = ["A lion in the grass.", "A deer near the trees, alone.", "An anteater.", "A deer."]
TRAIN = [("A lion sleeps.", "meat"), ("A deer near the trees.", "plants"), ("An anteater!", "meat")]
HAND_WRITTEN = "What does this animal eat?\n"
PROMPT_TOKENS = 4


@pytest.fixture(scope="module")
def base() -> PromptedBase:
    return load_unsharded(BASE, "int8")


@pytest.fixture(scope="module")
def reference(base: PromptedBase) -> PreTrainedModel:
    """The model of transformers with the dequantized weights of ``base``."""
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()
    layers = dict(model.named_modules())
    for name, layer in base.model.named_modules():
        if isinstance(layer, FrozenLinear) and layer.absmax is not None:
            weight, scale = layer.matrix()
            assert scale is not None
            layers[name].weight.data = weight.float() * scale[:, None]
    return model


def make_run(folder: Path, **task: Any) -> RunConfig:
    """Write rows and a trained prompt ``soft``; return the run."""
    rows = [{"text": text, "label": CHOICES[i % 3]} for i, text in enumerate(TEXTS)]
    train = [{"text": text, "label": label} for text, label in TRAIN]
    for name, content in (("train", train), ("valid", rows)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    settings = {
        "name": "diet",
        "train": str(folder / "train.jsonl"),
        "validation": str(folder / "valid.jsonl"),
        "input": "{text}\nAnswer:",
        "target": " {label}",
        "choices": CHOICES,
        "metric": "accuracy",
        "hand_written": [HAND_WRITTEN],
    }
    tokens = torch.randn(PROMPT_TOKENS, 128, generator=torch.Generator().manual_seed(3)) * 0.2
    save_peft(
        folder / "prompts" / "soft",
        VirtualTokens(tokens),
        str(BASE),
        num_layers=4,
        num_attention_heads=2,
    )
    return RunConfig.model_validate(
        {
            "output_dir": str(folder),
            "base": {"model": str(BASE)},
            "tasks": [settings | task],
            "prompts": [{"name": "soft", "task": "diet", "num_virtual_tokens": PROMPT_TOKENS}],
            "training": {"steps": 1},
        }
    )


def build(
    folder: Path, config: RunConfig, adapters: Sequence[str] = (), **options: Any
) -> tuple[list[Arm], list[Any]]:
    """Arms of the only task, and the adapters."""
    builder, read = builder_of(folder, config, adapters, **options)
    return builder.build(), read


def builder_of(
    folder: Path,
    config: RunConfig,
    adapters: Sequence[str] = (),
    *,
    context: int = 512,
    **options: Any,
) -> tuple[ArmBuilder, list[Any]]:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    data = load_tasks(config, tokenizer, context, len(tokenizer))["diet"]
    read = [read_adapter(path, str(BASE)) for path in adapters]
    prompts = [adapter for adapter in read if isinstance(adapter, PromptAdapter)]
    weights = [adapter for adapter in read if isinstance(adapter, WeightAdapter)]
    builder = ArmBuilder(
        Options(folder, **options),
        config,
        data,
        RowEncoder(tokenizer, context, len(tokenizer), None, (), no_progress),
        [(0, config.prompts[0])],
        [PROMPT_TOKENS] + [PROMPT_TOKENS] * len(prompts),
        [(1 + i, adapter) for i, adapter in enumerate(prompts)],
        list(enumerate(weights)),
    )
    return builder, [*prompts, *weights]


def score(
    folder: Path,
    base: PromptedBase,
    arms: Sequence[Arm],
    adapters: Sequence[Any] = (),
    done: Mapping[str, int] | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Records of every arm, as written to the files."""
    store = PredictionStore(folder)
    counts = {a.name: store.open(a.task, a.name, "digest", fresh=False) for a in arms}
    engine: Any = OneRank()
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    folders = [folder / "prompts" / "soft"]
    folders += [a.folder for a in adapters if isinstance(a, PromptAdapter)]
    weights = [a for a in adapters if isinstance(a, WeightAdapter)]
    scorer = ArmScorer(
        Evaluator(engine, base, tokenizer, TokenBudget(300)),
        [load_peft(path) for path in folders],
        [(adapter, load_tensors(adapter, torch.device("cpu"))) for adapter in weights],
        store,
    )
    scorer.score(arms, done or counts, lambda texts: None)
    return {arm.name: store.records(arm.task, arm.name) for arm in arms}


def by_hand(model: Any, text: str, before: str = "", virtual_tokens: int = 0) -> list[float]:
    """Log-likelihood of every choice after a text, with one call per choice."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    read = tokenizer(f"{before}{text}\nAnswer:")["input_ids"]
    values = []
    for choice in CHOICES:
        ids = tokenizer(f"{before}{text}\nAnswer: {choice}")["input_ids"]
        assert ids[: len(read)] == read
        ids.append(tokenizer.eos_token_id)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, virtual_tokens:]
        nll = torch.nn.functional.cross_entropy(
            logits[len(read) - 1 : -1], torch.tensor(ids[len(read) :]), reduction="sum"
        )
        values.append(-float(nll))
    return values


def assert_scores(records: Sequence[Mapping[str, Any]], wanted: Sequence[Sequence[float]]) -> None:
    actual = [[record["scores"][choice] for choice in CHOICES] for record in records]
    torch.testing.assert_close(torch.tensor(actual), torch.tensor(wanted), rtol=1e-4, atol=1e-4)
    for record, values in zip(records, wanted, strict=True):
        likeliest = CHOICES[max(range(3), key=lambda i: values[i])]
        assert record["prediction"] == likeliest
        assert record["correct"] == (likeliest == record["target"])


def shown(texts: Sequence[tuple[str, str]]) -> str:
    return "".join(f"{text}\nAnswer: {label}\n\n" for text, label in texts)


def test_arms_without_weights_equal_transformers(
    tmp_path: Path, base: PromptedBase, reference: PreTrainedModel
) -> None:
    config = make_run(tmp_path)
    arms, _ = build(tmp_path, config, shots=2, retrieved=1)
    records = score(tmp_path, base, arms)
    assert [arm.kind for arm in arms] == [
        *("no_prompt", "hand_written", "shots", "retrieved", "prompt", "prompt_retrieved")
    ]
    assert_scores(records["no_prompt"], [by_hand(reference, text) for text in TEXTS])
    hand_written = [by_hand(reference, text, HAND_WRITTEN) for text in TEXTS]
    assert_scores(records["hand_written-1"], hand_written)
    lines = {f"{tmp_path}/train.jsonl:{i + 1}": row for i, row in enumerate(TRAIN)}
    soft = peft.PeftModel.from_pretrained(reference, tmp_path / "prompts" / "soft")
    for name, model, virtual in (
        ("shots-2", reference, 0),
        ("retrieved-1", reference, 0),
        ("soft", soft, PROMPT_TOKENS),
        ("soft+retrieved-1", soft, PROMPT_TOKENS),
    ):
        texts = [shown([lines[place] for place in r.get("examples", ())]) for r in records[name]]
        wanted = [
            by_hand(model, text, before, virtual) for text, before in zip(TEXTS, texts, strict=True)
        ]
        assert_scores(records[name], wanted)
    retrieved = [record["examples"] for record in records["retrieved-1"]]
    assert retrieved == [[f"{tmp_path}/train.jsonl:{line}"] for line in (1, 2, 3, 2)], (
        "the most similar train row of each text"
    )
    assert len({tuple(record["examples"]) for record in records["shots-2"]}) == 1


def trained(model: PreTrainedModel, config: Any, folder: Path) -> Any:
    """Save an adapter with random values, and return its model."""
    adapted = peft.get_peft_model(model, config)
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name or "ia3_" in name or "prompt" in name:
            torch.nn.init.normal_(parameter, mean=float("ia3_" in name), std=0.2)
    adapted.save_pretrained(folder)
    return adapted.eval()


ADAPTERS = {
    "lora": lambda: peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj", "v_proj", "down_proj", "gate_proj"],
        rank_pattern={"v_proj": 2},
        alpha_pattern={"layers.1.self_attn.q_proj": 3},
        task_type="CAUSAL_LM",
    ),
    "rslora": lambda: peft.LoraConfig(
        r=3, use_rslora=True, target_modules="all-linear", task_type="CAUSAL_LM"
    ),
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        task_type="CAUSAL_LM",
    ),
    "prompt": lambda: peft.PromptTuningConfig(
        num_virtual_tokens=PROMPT_TOKENS, task_type="CAUSAL_LM"
    ),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_equal_peft(
    kind: str, tmp_path: Path, base: PromptedBase, reference: PreTrainedModel
) -> None:
    config = make_run(tmp_path)
    adapted = trained(copy.deepcopy(reference), ADAPTERS[kind](), tmp_path / kind)
    arms, adapters = build(tmp_path, config, [str(tmp_path / kind)])
    for adapter in adapters:
        if isinstance(adapter, WeightAdapter):
            check_layers(base.model, adapter)
    records = score(tmp_path, base, arms, adapters)
    virtual = PROMPT_TOKENS if kind == "prompt" else 0
    wanted = [by_hand(adapted, text, "", virtual) for text in TEXTS]
    plain = [by_hand(reference, text) for text in TEXTS]
    assert not torch.allclose(torch.tensor(wanted), torch.tensor(plain), atol=0.05)
    assert_scores(records[kind], wanted)
    assert_scores(records["no_prompt"], plain)


def test_an_adapter_whose_virtual_tokens_leave_no_room_is_refused(tmp_path: Path) -> None:
    builder, _ = builder_of(tmp_path, make_run(tmp_path))
    adapter = PromptAdapter("long", tmp_path / "long", 1)
    builder.sizes, builder.prompt_adapters = [PROMPT_TOKENS, 505], [(1, adapter)]
    with pytest.raises(BadInput, match="after its 505 virtual tokens, 7 tokens fit"):
        builder.build()


def test_an_interrupted_evaluation_continues_after_the_last_complete_record(
    tmp_path: Path, base: PromptedBase
) -> None:
    arms, _ = build(tmp_path, make_run(tmp_path))
    whole_run = score(tmp_path, base, arms)
    store = PredictionStore(tmp_path)
    path = store.path("diet", "soft")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2]) + lines[2][:20])
    store.path("diet", "no_prompt").unlink()
    kept = store.open("diet", "soft", "digest", fresh=False)
    assert kept == 2
    again = score(tmp_path, base, arms)
    for name, records in whole_run.items():
        assert [record["row"] for record in again[name]] == [1, 2, 3, 4]
        for before, after in zip(records, again[name], strict=True):
            assert after["prediction"] == before["prediction"]
            assert after["loss"] == pytest.approx(before["loss"], rel=1e-5)
    assert store.open("diet", "soft", "another digest", fresh=False) == 0
    assert store.open("diet", "no_prompt", "digest", fresh=True) == 0


def test_records_of_other_settings_are_kept_and_used_again(tmp_path: Path) -> None:
    store = PredictionStore(tmp_path)
    place = "diet", "soft"

    def open_with(digest: str, *, fresh: bool = False) -> int:
        return store.open(*place, digest, fresh=fresh, about={"scored_as": digest})

    assert open_with("greedy") == 0
    store.append(*place, [{"row": 1, "prediction": "a"}, {"row": 2, "prediction": "b"}])
    store.note(*place, 2.5)
    assert open_with("sampled") == 0
    assert store.records(*place) == []
    assert store.setup_seconds(*place) is None
    store.append(*place, [{"row": 1, "predictions": ["a", "c"]}])
    assert [path.stem for path in files_in(tmp_path)] == ["soft"], "only the current ones"
    assert open_with("greedy") == 2
    assert [record["prediction"] for record in store.records(*place)] == ["a", "b"]
    assert store.setup_seconds(*place) == 2.5
    about = json.loads(store.path(*place).with_suffix(".json").read_text())
    assert about["scored_as"] == "greedy"
    assert open_with("sampled") == 1
    assert store.records(*place)[0]["predictions"] == ["a", "c"]
    assert open_with("greedy", fresh=True) == 0
    assert open_with("sampled") == 1, "only the records of the same settings are removed"
    assert open_with("greedy") == 0


def test_two_evaluations_of_one_run_at_the_same_time(tmp_path: Path) -> None:
    first, second = PredictionStore(tmp_path), PredictionStore(tmp_path)
    with first.locked(), pytest.raises(BadInput, match="another evaluation"), second.locked():
        pass
    with second.locked():
        pass


def test_more_examples_than_the_context_holds(tmp_path: Path) -> None:
    config = make_run(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    data = load_tasks(config, tokenizer, 40, len(tokenizer))["diet"]
    encoder = RowEncoder(tokenizer, 40, len(tokenizer), None, (), no_progress)
    builder = ArmBuilder(
        Options(tmp_path, shots=3), config, data, encoder, [(0, config.prompts[0])], [4]
    )
    expected = "--shots 3: the context does not hold the examples; lower it: .*40"
    with pytest.raises(BadInput, match=expected) as refusal:
        builder.build()
    assert "too_long" not in str(refusal.value), "the rows alone fit"


@pytest.mark.parametrize("option", ["shots", "retrieved"])
def test_a_row_that_is_truncated_without_examples(tmp_path: Path, option: str) -> None:
    with pytest.raises(BadInput) as refusal:
        build(tmp_path, make_run(tmp_path, too_long="truncate"), context=16, **{option: 1})
    (problem,) = refusal.value.problems
    assert problem.startswith(f"--{option} 1: ")
    assert "without examples, and rows after examples are not truncated; leave the" in problem
    assert "lower it" not in problem


@pytest.mark.parametrize("option", ["shots", "retrieved", "knn"])
def test_more_examples_than_train_rows(tmp_path: Path, option: str) -> None:
    with pytest.raises(BadInput, match=rf"--{option} 9: .*only 3 train rows.*lower it"):
        build(tmp_path, make_run(tmp_path), **{option: 9})


def test_a_row_is_not_its_own_neighbor(tmp_path: Path) -> None:
    config = make_run(tmp_path)
    rows = [*TRAIN, (TEXTS[0], CHOICES[0])]  # the last one equals the first row to answer
    lines = [json.dumps({"text": text, "label": label}) for text, label in rows]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    expected = "--knn 4: only 3 train rows that differ from the row to answer"
    with pytest.raises(BadInput, match=expected):
        build(tmp_path, config, knn=4)
    build(tmp_path, config, knn=3)


def test_a_block_has_no_more_rows_than_have_probabilities(
    tmp_path: Path, base: PromptedBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("commands.evaluate.scoring", "evaluation.prediction_records"):
        monkeypatch.setattr(f"trainer.{module}.MAX_TEXTS", 3)
    arms, _ = build(tmp_path, make_run(tmp_path))
    records = score(tmp_path, base, arms[:1])["no_prompt"]
    assert [len(record["probabilities"]) for record in records] == [len(CHOICES)] * len(TEXTS)


def test_an_arm_is_scored_again_if_what_it_depends_on_changes(tmp_path: Path) -> None:
    config = make_run(tmp_path)
    (arms, _), (others, _) = build(tmp_path, config), build(tmp_path, config, shots=1)
    digest = {arm.name: arm.digest("base", ["p"], []) for arm in arms}
    assert digest == {a.name: a.digest("base", ["p"], []) for a in others if a.kind != "shots"}
    assert arms[-1].digest("base", ["q"], []) != digest["soft"]
    assert arms[0].digest("other base", ["p"], []) != digest["no_prompt"]
    other = make_run(tmp_path, input="{text}\nDiet:")
    (changed, *_), _ = build(tmp_path, other)
    assert changed.digest("base", ["p"], []) != digest["no_prompt"]


def test_knn_prompting_equals_transformers(
    tmp_path: Path, base: PromptedBase, reference: PreTrainedModel
) -> None:
    config = make_run(tmp_path)
    train = [*TRAIN, ("Ants and a tree.", "insects"), (TEXTS[0], "plants"), ("Grass.", "plants")]
    rows = [{"text": text, "label": label} for text, label in train]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arms, _ = build(tmp_path, config, knn=2)
    records = score(tmp_path, base, [arm for arm in arms if arm.kind == "knn"])["knn-2"]
    tokenizer = AutoTokenizer.from_pretrained(BASE)

    def distribution(text: str) -> torch.Tensor:
        ids = tokenizer(f"{text}\nAnswer:", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            return reference(input_ids=ids).logits[0, -1].log_softmax(-1)

    log_AV = torch.stack([distribution(text) for text, _ in train])
    for record, text in zip(records, TEXTS, strict=True):
        log_V = distribution(text)
        divergence_A = (log_V.exp() * (log_V - log_AV)).sum(-1)
        if text == TEXTS[0] and record["target"] == "plants":
            divergence_A[4] = torch.inf  # the same row
        near = divergence_A.argsort()[:2].tolist()
        assert record["neighbors"] == [f"{tmp_path}/train.jsonl:{i + 1}" for i in near]
        labels = [train[i][1] for i in near]
        assert record["prediction"] == labels[0]  # both votes count the same: the nearest one
        assert record["probabilities"] == {c: labels.count(c) / 2 for c in CHOICES}
    assert records[0]["target"] == "plants"


def test_damaged_records_are_named_with_a_remedy(tmp_path: Path) -> None:
    store = PredictionStore(tmp_path)
    store.open("diet", "soft", "digest", fresh=False)
    store.append("diet", "soft", [{"row": 1}])
    with store.path("diet", "soft").open("a") as file:
        file.write("no record\n")
    with pytest.raises(BadInput, match=r"soft\.jsonl: is damaged .*; remove it and repeat"):
        store.records("diet", "soft")
    store.path("diet", "soft").unlink()
    assert store.open("diet", "soft", "digest", fresh=False) == 0
    assert store.records("diet", "soft") == []


def test_a_half_without_rows_is_refused_before_anything_is_scored(tmp_path: Path) -> None:
    config = make_run(tmp_path)
    (tmp_path / "valid.jsonl").write_text('{"text": "A deer.", "label": "plants"}\n' * 4)
    with pytest.raises(BadInput, match=r"--select-on half: .* all 4 rows of task 'diet' into one"):
        build(tmp_path, config, select_on="half")


def test_rows_are_retrieved_by_the_cosine_of_mean_hidden_states(
    tmp_path: Path, base: PromptedBase, reference: PreTrainedModel
) -> None:
    config = make_run(tmp_path)
    train = [*TRAIN, ("Ants and a tree.", "insects"), (TEXTS[0], "plants"), ("Grass.", "plants")]
    rows = [{"text": text, "label": label} for text, label in train]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    builder, _ = builder_of(tmp_path, config, retrieved=2, retriever="cosine")
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    engine: Any = OneRank()
    engine.run_on_main = lambda function: function()
    evaluator = Evaluator(engine, base, tokenizer, TokenBudget(60))
    console = Console(io.StringIO(), io.StringIO())
    on_demand: Any = SimpleNamespace(
        engine=engine, evaluator=evaluator, console=console, digest="base"
    )
    store = PredictionStore(tmp_path)
    builder.similar = cosine_similar(builder, on_demand, store)

    inputs = [f"{text}\nAnswer:" for text in [*(text for text, _ in train), *TEXTS]]
    ids = [tokenizer(text)["input_ids"] for text in inputs]
    common = next(i for i, column in enumerate(zip(*ids, strict=False)) if len(set(column)) > 1)
    with torch.no_grad():
        states = torch.stack(
            [
                reference(input_ids=torch.tensor([row]), output_hidden_states=True)
                .hidden_states[-1][0, common:]
                .mean(0)
                for row in ids
            ]
        )
    read = mean_hidden_states(evaluator, ids, lambda texts: None)
    torch.testing.assert_close(read, states, rtol=1e-4, atol=1e-4)
    centered = states - states[: len(train)].mean(0)
    wanted = []
    for row, text in enumerate(TEXTS):
        cosine_A = torch.cosine_similarity(centered[len(train) + row], centered[: len(train)])
        same = torch.tensor([text == other for other, _ in train])
        nearest = cosine_A.masked_fill(same, -torch.inf).argsort(descending=True)[:2].tolist()
        wanted.append(nearest[::-1])
    assert builder.similar.chosen == wanted
    assert builder.similar.query_tokens == sum(map(len, ids[len(train) :])) / len(TEXTS)

    arms = {arm.name: arm for arm in builder.build()}
    assert {"retrieved-2-cosine", "soft+retrieved-2-cosine"} < set(arms)
    places = arms["retrieved-2-cosine"].examples
    assert places == [[f"{tmp_path}/train.jsonl:{i + 1}" for i in row] for row in wanted]
    on_demand.evaluator = None  # an earlier result is used
    assert cosine_similar(builder, on_demand, store) == builder.similar


def test_changed_rows_are_scored_as_their_own_texts(
    tmp_path: Path, base: PromptedBase, reference: PreTrainedModel
) -> None:
    config = make_run(tmp_path, paraphrases=["{text}\nIt eats:"])
    arms, _ = build(tmp_path, config, robustness=True)
    changes = ["lower_case", "no_punctuation", "typos", "paraphrase-1"]
    assert {arm.change for arm in arms} == {None, *changes}
    records = score(tmp_path, base, arms)
    lower = [by_hand(reference, text.lower()) for text in TEXTS]
    assert_scores(records["no_prompt@lower_case"], lower)
    without = [text.replace(".", "").replace(",", "") for text in TEXTS]
    wanted = [by_hand(reference, text, HAND_WRITTEN) for text in without]
    assert_scores(records["hand_written-1@no_punctuation"], wanted)
    soft = peft.PeftModel.from_pretrained(reference, tmp_path / "prompts" / "soft")
    scores = [record["scores"] for record in records["soft@paraphrase-1"]]
    assert scores != [record["scores"] for record in records["soft"]]
    assert_scores(records["soft"], [by_hand(soft, t, "", PROMPT_TOKENS) for t in TEXTS])


def test_rows_of_token_ids_are_not_changed(tmp_path: Path) -> None:
    config = make_run(tmp_path)
    row = json.dumps({"input_ids": [5, 6, 7], "labels": [-100, 6, 7]})
    files = {"train": "train.jsonl", "validation": "valid.jsonl", "shifted_validation": "new.jsonl"}
    for name in files.values():
        (tmp_path / name).write_text(f"{row}\n{row}\n")
    columns = {"input_ids": "input_ids", "labels": "labels"}
    settings = {"name": "diet", "metric": "loss", "tokens": columns}
    settings |= {split: str(tmp_path / name) for split, name in files.items()}
    values = config.model_dump(mode="json") | {"tasks": [settings]}
    arms, _ = build(tmp_path, RunConfig.model_validate(values), robustness=True)
    assert {arm.change for arm in arms} == {None, "shifted_validation"}


@pytest.mark.parametrize("metric", ["exact_match", "chrf"])
def test_generated_text_equals_transformers(
    metric: str, tmp_path: Path, base: PromptedBase, reference: PreTrainedModel
) -> None:
    if metric == "chrf":
        pytest.importorskip("sacrebleu")
    arms, _ = build(tmp_path, make_run(tmp_path, max_new_tokens=4), metric=metric, shots=1)
    records = score(tmp_path, base, [arm for arm in arms if arm.kind in ("no_prompt", "shots")])
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    lines = {f"{tmp_path}/train.jsonl:{i + 1}": row for i, row in enumerate(TRAIN)}
    for name, of_arm in records.items():
        for record, text in zip(of_arm, TEXTS, strict=True):
            before = shown([lines[place] for place in record.get("examples", ())])
            ids = tokenizer(f"{before}{text}\nAnswer:", return_tensors="pt")["input_ids"]
            written = reference.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
            wanted = tokenizer.decode(written, skip_special_tokens=True)
            assert record["prediction"].strip() == wanted.strip(), name
            assert record["correct"] == (wanted.strip() == record["target"].strip())
    task = arms[0].rows.task
    assert 0 <= row_sums(metric, task, records["no_prompt"]).score <= 1
