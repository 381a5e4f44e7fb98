"""Generated text is what transformers' ``generate`` writes, and ends where that ends.

One small base is trained until it knows the answers of twelve rows in every template here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from benchmarks.unsharded_base import load_unsharded
from tests.one_rank import OneRank
from trainer.config import Base, RunConfig, Task
from trainer.data.task_data import EvalSet, load_tasks
from trainer.evaluation.evaluator import Evaluator
from trainer.evaluation.generation import generate
from trainer.evaluation.scoring import Request, Scored
from trainer.evaluation.stop_criteria import StopCriteria, before_stop, check_targets
from trainer.model.checkpoint_files import open_base
from trainer.model.families import context_length
from trainer.model.generation_config import read_generation_config
from trainer.packing.activation_memory import TokenBudget
from trainer.prompts.soft_prompt import VirtualTokens
from trainer.runtime.errors import BadInput

ANSWERS = [
    "billing",
    "technical",
    "other",
    "yes",
    "no",
    "fine",
    "today",
    "refund",
    "update",
    "screen",
    "hello",
    "thanks",
]
QUESTIONS = [f"Question {i}: which topic?" for i in range(len(ANSWERS))]
SPECIAL = ["<pad>", "<bos>", "<eos>", "<start>", "<end>", "<think>", "</think>", "<channel>"]
SPECIAL += ["<message>", "<return>", "<yes>", "<no>"]

_TURNS = (
    "{{ '<bos>KIND' }}{% for m in messages %}{{ '<start>' + m.role }}"
    "{% if m.role == 'assistant' %}ANSWER{% else %}{{ '\n' + m.content + '<end>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start>assistantOPEN' }}{% endif %}"
)


def template(kind: str, answer: str, opening: str) -> str:
    return _TURNS.replace("KIND", kind).replace("ANSWER", answer).replace("OPEN", opening)


#: What the template writes around the answer is in no content, but the base has to write it.
TEMPLATES = {
    "gemma": template("G", r"{{ '\n' + m.content + '<end>\n' }}", r"\n"),
    "qwen3": template("Q", r"{{ '\n<think>\n\n</think>\n\n' + m.content + '<end>\n' }}", r"\n"),
    "gpt-oss": template("O", "{{ '<channel>final<message>' + m.content + '<return>' }}", ""),
}
#: Rows without a template; what follows the answer is for stop strings.
PLAIN = "?\n{q}\n:{a}<eos>"
RUNS_ON = "!\n{q}!?{a}.\n\nQuestion 1"


def make_tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    # One token, ".\n\nQuestion", holds the beginning of a stop string in its middle.
    inner.train_from_iterator(
        [*QUESTIONS, *ANSWERS, ".\n\nQuestion", "user\n", "assistant"] * 3, trainer
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )


def dialogue(i: int) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": QUESTIONS[i]},
        {"role": "assistant", "content": ANSWERS[i]},
    ]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose ``generation_config.json`` names three end tokens."""
    folder = tmp_path_factory.mktemp("knows")
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    texts = []
    for i in range(len(ANSWERS)):
        for chat_template in TEMPLATES.values():
            tokenizer.chat_template = chat_template
            text = tokenizer.apply_chat_template(dialogue(i), tokenize=False)
            # It would continue with another turn, as bases of dialogues do.
            texts.append(text + "<start>user\n")
        texts += [p.format(q=QUESTIONS[i], a=ANSWERS[i]) for p in (PLAIN, RUNS_ON)]
    tokenizer.padding_side = "right"
    batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[:, :5] = -100  # nobody knows which question comes
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    optimizer = torch.optim.Adam(model.parameters(), 6e-3)
    loss = torch.ones(())
    while loss > 0.01:
        loss = model(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(
        ["<eos>", "<end>", "<return>"]
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_task(**settings: Any) -> Task:
    return Task(name="t", train="x.jsonl", **settings)


def rows_of(folder: Path, rows: list[dict[str, Any]], tokenizer: Any, **task: Any) -> EvalSet:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = {
        "output_dir": "out",
        "base": {"model": "m"},
        "tasks": [{"name": "t", "train": str(path), "validation": str(path), **task}],
        "prompts": [{"name": "p", "task": "t", "num_virtual_tokens": 2}],
        "training": {"steps": 1},
    }
    config = RunConfig.model_validate(run)
    return load_tasks(config, tokenizer, 128, len(tokenizer))["t"].evaluation["validation"]


def scored(base: Path, tokenizer: Any, rows: EvalSet) -> Scored:
    evaluator = Evaluator(OneRank(), load_unsharded(base, "none"), tokenizer, TokenBudget(512))
    return evaluator.score([Request(rows, None)], [])[0]


def plain_texts(base: Path, tokenizer: Any, inputs: list[Any], **settings: Any) -> list[str]:
    """What transformers writes, one row at a time."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    texts = []
    for ids in inputs:
        given = torch.tensor([list(ids)])
        out = model.generate(given, do_sample=False, **({"max_new_tokens": 16} | settings))
        texts.append(tokenizer.decode(out[0, given.shape[1] :], skip_special_tokens=True))
    return texts


def openings(tokenizer: Any) -> list[Any]:
    return [
        tokenizer.apply_chat_template(dialogue(i)[:1], add_generation_prompt=True)["input_ids"]
        for i in range(len(ANSWERS))
    ]


def our_ids(base: Path, inputs: list[Any], ending: StopCriteria, most: int = 16) -> list[list[int]]:
    texts = generate(OneRank(), load_unsharded(base, "none"), ending, inputs, None, most)
    return [text.ids for text in texts]


@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_of_dialogues_are_compared_as_the_template_writes_them(tmp_path, base, name):
    tokenizer = open_base(Base(model=str(base))).tokenizer
    tokenizer.chat_template = TEMPLATES[name]
    rows = [{"messages": dialogue(i)} for i in range(len(ANSWERS))]
    task = {"messages": "messages", "metric": "exact_match", "max_new_tokens": 16}
    answers = scored(base, tokenizer, rows_of(tmp_path, rows, tokenizer, **task))
    assert answers.scores["exact_match"] == 1.0
    assert answers.correct_R == [True] * len(rows)
    assert answers.texts_R == answers.targets_R
    special = {
        "gemma": "",
        "qwen3": "<think>\n\n</think>\n\n",
        "gpt-oss": "<channel>final<message>",
    }
    assert answers.texts_R == [special[name] + answer for answer in ANSWERS]
    # An answer of another row is wrong.
    rows = [{"messages": [dialogue(i)[0], dialogue(i - 1)[1]]} for i in range(len(ANSWERS))]
    answers = scored(base, tokenizer, rows_of(tmp_path, rows, tokenizer, **task))
    assert answers.scores["exact_match"] == 0.0


@pytest.mark.parametrize("name", TEMPLATES)
def test_text_is_that_of_transformers(base, name):
    files = open_base(Base(model=str(base)))
    tokenizer = files.tokenizer
    tokenizer.chat_template = TEMPLATES[name]
    ending = StopCriteria(tokenizer, frozenset(files.generation.eos_token_id))
    inputs = openings(tokenizer)
    written = [ending.text(ids, skip_special_tokens=True) for ids in our_ids(base, inputs, ending)]
    assert written == plain_texts(base, tokenizer, inputs)


def test_generation_ends_at_a_stop_string(tmp_path, base):
    """``\\n\\n`` begins inside the token ``.\\n`` and ends in the next one."""
    tokenizer = open_base(Base(model=str(base))).tokenizer
    rows = [{"q": q, "a": a} for q, a in zip(QUESTIONS, ANSWERS, strict=True)]
    task = {"input": "!\n{q}!?", "target": "{a}.", "metric": "exact_match", "max_new_tokens": 12}
    task["append_eos"] = False
    answers = scored(base, tokenizer, rows_of(tmp_path, rows, tokenizer, **task))
    assert answers.scores["exact_match"] == 0.0
    assert all(
        text.startswith(a + ".\n\nQuestion")
        for text, a in zip(answers.texts_R, ANSWERS, strict=True)
    )
    for stop in (["\n\n"], ["Question", "\n"], [".\n\nQuestion", "\n\nQ"]):
        rows_to_score = rows_of(tmp_path, rows, tokenizer, stop=stop, **task)
        answers = scored(base, tokenizer, rows_to_score)
        expected = [f"{a}." if stop[0] != ".\n\nQuestion" else a for a in ANSWERS]
        assert [text.strip() for text in answers.texts_R] == expected
        assert answers.scores["exact_match"] == float(expected[0] == "billing.")


@pytest.mark.parametrize("num_virtual", [0, 4])
def test_texts_end_at_the_context_of_the_base(family, num_virtual):
    """GPT-2 has no positions beyond; rows that have ended wait for the others of their batch."""
    base = load_unsharded(family("gpt2"), "int8")
    context = context_length(base.model.config)
    prompt = VirtualTokens(torch.randn(num_virtual, base.hidden_size)) if num_virtual else None
    rows = [[3] * (context - num_virtual - 2), [4] * 5]
    stop = StopCriteria(None, frozenset())
    together = generate(OneRank(), base, stop, rows, prompt, 9)
    assert [len(text.ids) for text in together] == [2, 9]
    (alone,) = generate(OneRank(), base, stop, rows[1:], prompt, 9)
    assert together[1].ids == alone.ids


def test_a_batch_ends_when_all_rows_have_ended(base):
    """A row that has ended costs no further step, and rows do not disturb each other."""
    files = open_base(Base(model=str(base)))
    steps = 0
    model = load_unsharded(base, "none")

    def count(*_: Any) -> None:
        nonlocal steps
        steps += 1

    model.register_forward_hook(count)
    ending = StopCriteria(files.tokenizer, frozenset(), ("\n\n",))
    inputs = [files.tokenizer(f"!\n{q}!?")["input_ids"] for q in QUESTIONS]
    inputs[0] = [5, *inputs[0]]
    together = generate(OneRank(), model, ending, inputs, None, 30)
    assert steps == 3, "an answer, '.\\n' and '\\n'"
    alone = [generate(OneRank(), model, ending, [ids], None, 30)[0] for ids in inputs]
    assert [ending.text(text.ids) for text in together] == [ending.text(text.ids) for text in alone]
    assert [ending.text(text.ids) for text in together][1:] == [f"{a}." for a in ANSWERS[1:]]


def test_a_plain_task_ends_at_eos_where_its_targets_do(tmp_path, base):
    files = open_base(Base(model=str(base)))
    rows = [{"q": q, "a": a} for q, a in zip(QUESTIONS, ANSWERS, strict=True)]
    task = {"input": "?\n{q}\n:", "target": "{a}", "metric": "exact_match", "max_new_tokens": 8}
    answers = scored(base, files.tokenizer, rows_of(tmp_path, rows, files.tokenizer, **task))
    assert answers.scores["exact_match"] == 1.0
    assert answers.texts_R == ANSWERS

    # The reference of a row with choices is its own label, not the first choice.
    rows_with_choices = rows_of(tmp_path, rows, files.tokenizer, **task, choices=ANSWERS)
    answers = scored(base, files.tokenizer, rows_with_choices)
    assert answers.scores["exact_match"] == 1.0
    assert answers.targets_R == ANSWERS

    def ends(**settings: Any) -> set[int]:
        rows_to_score = rows_of(tmp_path, rows, files.tokenizer, **{**task, **settings})
        files.generation.eos_token_id = 4
        return set(StopCriteria.of(files.generation, files.tokenizer, rows_to_score.task).token_ids)

    assert ends() == {2, 4}
    assert ends(append_eos=False) == {4}, "as transformers"
    files.generation.stop_strings = "x"
    task = make_task(input="{q}", target="{a}", stop=["y"])
    assert StopCriteria.of(files.generation, files.tokenizer, task).strings == ("y", "x")


def test_special_tokens_in_labels_are_compared():
    tokenizer = make_tokenizer()
    yes, no, eos = tokenizer.convert_tokens_to_ids(["<yes>", "<no>", "<eos>"])
    ending = StopCriteria(tokenizer, frozenset({eos}), ("<no>",))
    assert ending.target([yes, eos, yes]) == "<yes>" == ending.text([yes, eos, no])
    assert ending.text([yes, no, yes]) == "<yes>"
    assert ending.text([yes, *tokenizer("hello")["input_ids"], no], skip_special_tokens=True) == (
        "hello"
    )
    assert before_stop("a\nb c", ["c", "b", "\n"]) == "a"
    assert before_stop("a", ["\n"]) == "a"


def write_generation(base: Path, to: Path, **settings: Any) -> Path:
    """The folder with another ``generation_config.json``; without settings, with none."""
    to.mkdir()
    for path in base.iterdir():
        (to / path.name).symlink_to(path)
    (to / "generation_config.json").unlink()
    if settings:
        (to / "generation_config.json").write_text(json.dumps(settings))
    return to


@pytest.mark.parametrize(
    "settings",
    [
        {"eos_token_id": 4, "repetition_penalty": 1.8, "min_new_tokens": 3},
        {"eos_token_id": [4], "no_repeat_ngram_size": 1, "do_sample": True, "top_k": 5},
        {"eos_token_id": [4, 9], "begin_suppress_tokens": [193, 222], "min_new_tokens": 6},
        {"eos_token_id": 4, "encoder_repetition_penalty": 1.8, "encoder_no_repeat_ngram_size": 2},
        {"pad_token_id": 0},
        {},
    ],
    ids=["penalty", "ngrams", "suppressed", "of-input", "no-end", "no-file"],
)
def test_generation_penalties_equal_those_of_transformers(tmp_path, base, settings):
    folder = write_generation(base, tmp_path / "base", **settings)
    files = open_base(Base(model=str(folder)))
    tokenizer = files.tokenizer
    tokenizer.chat_template = TEMPLATES["gemma"]
    inputs = [*openings(tokenizer)[:3], openings(tokenizer)[3][:4]]  # of two lengths
    task = make_task(messages="messages")
    ending = StopCriteria.of(files.generation, tokenizer, task)
    written = [ending.text(i, skip_special_tokens=True) for i in our_ids(folder, inputs, ending)]
    assert written == plain_texts(folder, tokenizer, inputs)


CONFIG = {"model_type": "llama", "eos_token_id": 7}


@pytest.mark.parametrize(
    ("given", "config", "expected"),
    [
        ({"eos_token_id": 4}, CONFIG, 4),
        ({"eos_token_id": [4, 5]}, CONFIG, [4, 5]),
        ({}, CONFIG, None),  # the file is there and names none: transformers does not look further
        ({"eos_token_id": None}, CONFIG, None),
        (None, CONFIG, 7),
        (None, {"model_type": "llama"}, None),  # not the default of the class
        (None, {"model_type": "gemma3", "text_config": {"eos_token_id": [1, 6]}}, [1, 6]),
        (None, {"eos_token_id": 8, "text_config": {"eos_token_id": 1}}, 8),
    ],
)
def test_the_order_in_which_end_tokens_are_looked_up(tmp_path, given, config, expected):
    (tmp_path / "config.json").write_text(json.dumps(config))
    if given is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(given))
    assert read_generation_config(tmp_path).eos_token_id == expected


@pytest.mark.parametrize(
    "text",
    ["{", "[1]", "3", '"x"', "null", "", "\udcff", '{"eos_token_id": "</s>"}']
    + [f'{{"eos_token_id": {value}}}' for value in ("[2, null]", "true", "1.5", "-1", '{"a": 1}')],
)
def test_a_damaged_generation_config_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    path = tmp_path / "generation_config.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(BadInput) as refused:
        read_generation_config(tmp_path)
    assert str(path) in str(refused.value)


def test_targets_that_cannot_be_generated_are_refused(tmp_path):
    tokenizer = make_tokenizer()
    rows = [{"q": "a", "a": text} for text in ("b", "b\n", "\nb", "b\nc", "d")]
    task = {"input": "{q}?", "target": "{a}", "metric": "exact_match"}

    def check(*ids: int, **settings: Any) -> str | None:
        candidates = rows_of(tmp_path, rows, tokenizer, **task, **settings)
        config = GenerationConfig(eos_token_id=list(ids))
        return check_targets(candidates, StopCriteria.of(config, tokenizer, candidates.task))

    with pytest.raises(BadInput) as refused:
        check(stop=["\n"])
    assert [problem.split(": ")[0] for problem in refused.value.problems] == [
        f"{tmp_path}/rows.jsonl:{line}" for line in (3, 4)
    ]
    assert "contains a string of tasks.t.stop" in str(refused.value)
    assert check(stop=["x"]) is None
    warning = check(7, append_eos=False)
    assert warning is not None
    assert "end tokens: [7]" in warning
    assert check(append_eos=False, stop=["\n\n\n"]) is not None
    dialogues = [{"messages": dialogue(i)} for i in range(3)]
    rows, task = dialogues, {"messages": "messages", "metric": "exact_match"}
    tokenizer.chat_template = TEMPLATES["gemma"]
    end = tokenizer.convert_tokens_to_ids("<end>")
    assert check(end) is None
    assert check(end, stop=["<end>"]) is None
    assert check(2, stop=["<end>"]) is None
    assert check(2) is not None


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": -1.0},
        {"repetition_penalty": "high"},
        {"bad_words_ids": [[99999]]},
        {"no_repeat_ngram_size": "two"},
        {"guidance_scale": 1.5},
    ],
)
def test_penalties_that_cannot_be_applied_are_refused_before_weights_are_read(
    tmp_path, base, settings
):
    folder = write_generation(base, tmp_path / "base", eos_token_id=2, **settings)
    with pytest.raises(BadInput, match=r"generation_config\.json"):
        load_unsharded(folder, "none")
