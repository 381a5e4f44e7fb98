"""Keys and values inside the turn of the system: score, generate, predict and chat."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.unit.saved_run import ROWS, TINY, save_run
from trainer.api import Run, load_base, load_run
from trainer.commands.predict.output_file import OutputFile
from trainer.commands.predict.plan import Options, make_plan
from trainer.commands.predict.program import Predictor, encode
from trainer.config import Base
from trainer.evaluation.generation import keys_and_values
from trainer.inference.loaded_base import InferenceBase
from trainer.prompts.peft_adapter import FixedText, save_peft
from trainer.prompts.soft_prompt import PrefixKeyValues
from trainer.runtime.console import Console

TEMPLATE = (
    "{% for turn in messages %}{{ turn.role }}\n{{ turn.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant\n{% endif %}"
)
BEFORE, WORDS = "system\n", "Which field of medicine"
AFTER = "\nuser\n{text}\nassistant\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose prompt is the keys and values of an instruction, after those of the template."""
    folder = save_run(tmp_path_factory.mktemp("run") / "out")
    (folder / "template.jinja").write_text(TEMPLATE)
    settings = yaml.safe_load((folder / "run.yaml").read_text())
    settings["base"]["chat_template"] = str(folder / "template.jinja")
    task, prompt = settings["tasks"][0], settings["prompts"][0]
    settings["tasks"] = [task | {"chat": True, "input": "{text}", "target": "{label}"}]
    prefix = {"method": "prefix_tuning", "encoder": "embedding", "position": "system"}
    settings["prompts"] = [prompt | prefix | {"name": "inside"}]
    tokenizer: Any = AutoTokenizer.from_pretrained(TINY)
    ids, words = (tokenizer(t, add_special_tokens=False)["input_ids"] for t in (BEFORE, WORDS))
    settings["prompts"][0]["num_virtual_tokens"] = len(words)
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    with patch.dict(os.environ), load_base(Base(model=str(TINY), quantization="none")) as base:
        past = keys_and_values(base.engine, base.loaded.model, [*ids, *words])
    text = FixedText(tuple(ids), len(ids), None, (BEFORE, ""))
    save_peft(
        folder / "prompts" / "inside",
        PrefixKeyValues(past),
        str(TINY),
        num_layers=4,
        num_attention_heads=4,
        fixed_text=text,
    )
    return load_run(folder)


@pytest.fixture(scope="module")
def base(run: Run) -> Iterator[InferenceBase]:
    with patch.dict(os.environ), load_base(run) as base:
        yield base


def next_word_of_peft(run: Run, text: str) -> str:
    """The most likely token after the text that follows the adapter."""
    plain = AutoModelForCausalLM.from_pretrained(TINY)
    model: Any = PeftModel.from_pretrained(plain, run.prompts["inside"].folder).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(TINY)
    ids = tokenizer(AFTER.format(text=text), add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        logits_V = model(**ids).logits[0, -1]
    return str(tokenizer.decode(logits_V.argmax())).strip()


def test_the_prompt_is_the_instruction_in_words(run: Run, base: InferenceBase) -> None:
    """Keys and values of a text are the text: the same dialogue without a prompt has the scores."""
    in_words = {"system": WORDS}
    task = base.config.tasks[0].model_copy(update=in_words)
    config = base.config.model_copy(update={"tasks": [task]})
    with patch.object(base, "config", config), patch.object(base, "run", None):
        expected = base.score(ROWS, task="triage")
    made = base.score(ROWS, "inside")
    for one, other in zip(made, expected, strict=True):
        assert one.scores is not None
        assert other.scores is not None
        torch.testing.assert_close(
            [*one.scores.values()], [*other.scores.values()], rtol=1e-5, atol=0
        )


def test_predict_scores_as_the_api_does(run: Run, base: InferenceBase, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    options = Options(run.folder, ("inside",), str(rows), tmp_path / "out.jsonl")
    plan, output = make_plan(options), OutputFile(options.out)
    output.open(plan.identity(options), fresh=False)
    with open(os.devnull, "w") as nothing:
        console = Console(nothing, nothing)
        Predictor(base, plan, encode(base, plan, console), output).run(0, console)
    lines = [json.loads(line) for line in options.out.read_text().splitlines()]
    expected = base.score(ROWS, "inside")
    assert [line["inside"]["prediction"] for line in lines] == [p.prediction for p in expected]
    for line, prediction in zip(lines, expected, strict=True):
        assert line["inside"]["scores"] == pytest.approx(prediction.scores, abs=1e-5)


def test_requests_follow_the_adapter_as_in_peft(run: Run, base: InferenceBase) -> None:
    text = ROWS[0]["text"]
    asked = base.text_request(text, "inside")
    tokenizer: Any = base.tokenizer
    assert tokenizer.decode(asked.input_ids) == AFTER.format(text=text)
    assert asked.prompt_at == 0
    turn = {"role": "user", "content": text}
    dialogue = base.dialogue_request([turn], "inside")
    assert (dialogue.input_ids, dialogue.prompt_at) == (asked.input_ids, 0)
    assert base.generate(text, "inside", max_new_tokens=1) == next_word_of_peft(run, text)
