"""The Python API equals PEFT, transformers and the trainer's own evaluation."""

from __future__ import annotations

import copy
import io
import json
import os
import runpy
import socket
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.unit.saved_run import LABELS, ROWS, TINY, save_run
from trainer.api import BadInput, Run, load_base, load_run
from trainer.commands.chat.messages import Channel, Question
from trainer.commands.chat.program import Answers, make_request
from trainer.commands.predict.output_file import OutputFile
from trainer.commands.predict.plan import Options, make_plan
from trainer.commands.predict.program import Predictor, encode
from trainer.data.dataset import RowDataset
from trainer.evaluation.prediction_records import scored_columns
from trainer.evaluation.scoring import Request
from trainer.inference.input_rows import read_rows
from trainer.inference.loaded_base import InferenceBase
from trainer.inference.predictions import encode_rows
from trainer.inference.requests import text_request
from trainer.inference.stream import StreamingDecoder
from trainer.inference.stream_batch import DecodingBatch
from trainer.inference.trained_prompts import load_prompts
from trainer.prompts.peft_adapter import save_peft
from trainer.prompts.soft_prompt import PrefixKeyValues
from trainer.runtime.console import Console

TEXTS = [row["text"] for row in ROWS]
UNLABELED = [{"text": text} for text in TEXTS]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return load_run(save_run(tmp_path_factory.mktemp("run") / "out"))


@pytest.fixture(scope="module")
def base(run: Run) -> Iterator[InferenceBase]:
    before = torch.nn.functional.linear
    with patch.dict(os.environ), load_base(run) as base:
        yield base
    # DeepSpeed replaces it for the whole process.
    assert torch.nn.functional.linear is before, "a closed base leaves torch as it was"


def log_likelihoods(run: Run, name: str, text: str) -> list[float]:
    """Those of all choices of a row after a prompt, computed by PEFT."""
    model: Any = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(TINY), run.prompts[name].folder
    ).eval()
    tokenizer = load_tokenizer()
    input_ids = tokenizer(f"{text}\nAnswer:")["input_ids"]
    values = []
    for label in LABELS:
        target = tokenizer(f" {label}", add_special_tokens=False)["input_ids"]
        ids = torch.tensor([[*input_ids, *target, tokenizer.eos_token_id]])
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
        logits = logits[-len(target) - 2 : -1].log_softmax(-1)
        values.append(logits.gather(1, ids[0, -len(target) - 1 :, None]).sum().item())
    return values


def load_tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TINY)


def test_a_rank_that_holds_the_whole_base_runs_it_without_hooks(base: InferenceBase) -> None:
    """ZeRO-3 has nothing to gather, and nothing is copied."""
    model = base.loaded.model
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    for parameter in model.parameters():
        zero: Any = parameter
        assert zero.data_ptr() == zero.ds_tensor.data_ptr()


def test_a_run_lists_its_finished_prompts(run: Run) -> None:
    assert list(run.prompts) == ["short", "long", "words"]
    prompt = run.prompts["short"]
    assert (prompt.task.name, prompt.method, prompt.num_virtual_tokens) == (
        *("triage", "prompt_tuning"),
        3,
    )
    assert prompt.tensor.shape == (3, 128)
    assert prompt.scores == {"validation_accuracy": 0.75}
    assert run.summary is not None
    assert run.summary.steps == 4


def test_scores_equal_those_of_peft(run: Run, base: InferenceBase) -> None:
    (made,) = base.score(ROWS[1:2], "long")
    expected = log_likelihoods(run, "long", TEXTS[1])
    assert made.scores is not None
    assert list(made.scores) == LABELS
    torch.testing.assert_close([*made.scores.values()], expected, rtol=0, atol=1e-4)
    assert made.prediction == LABELS[expected.index(max(expected))]
    assert made.log_probability == max(made.scores.values())
    assert made.nll == pytest.approx(-expected[1], abs=1e-4)
    assert made.probabilities is not None
    assert sum(made.probabilities.values()) == pytest.approx(1)


@pytest.mark.parametrize("name", ["short", "words"])
def test_predictions_equal_those_of_an_evaluation(run: Run, base: InferenceBase, name: str) -> None:
    prompt, values = run.prompts[name], base.soft_prompt(name)
    assert values is not None
    given = read_rows(ROWS, prompt.task)
    assert isinstance(given.rows, RowDataset)
    rows = encode_rows(base.files, base.config.prompts, given, ["front"], None)["front"]
    (scored,) = base.evaluator.score([Request(rows, 0)], [values])
    columns = scored_columns(rows, scored)
    made = base.score(ROWS, name)
    assert [prediction.prediction for prediction in made] == columns["prediction"]
    torch.testing.assert_close([prediction.nll for prediction in made], columns["loss"])


def test_a_row_without_finite_likelihoods_has_no_prediction(
    run: Run, base: InferenceBase, tmp_path: Path
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    options = Options(run.folder, ("short", "long"), str(data), tmp_path / "out.jsonl")
    plan, output = make_plan(options), OutputFile(options.out)
    output.open(plan.identity(options), fresh=False)
    values = base.soft_prompt("short")
    assert values is not None
    broken = replace(values, tensor=torch.full_like(values.tensor, torch.nan))
    read, text = base.soft_prompt, io.StringIO()
    with patch.object(base, "soft_prompt", lambda p: broken if p.name == "short" else read(p)):
        console = Console(text, text)
        Predictor(base, plan, encode(base, plan, console), output).run(0, console)
    for line in map(json.loads, options.out.read_text().splitlines()):
        assert line["short"]["prediction"] is None
        assert line["short"]["log_probability"] is None
        assert set(line["short"]["scores"].values()) == {None}
        assert line["long"]["prediction"] in LABELS
    assert "rows without a prediction: 5 by short; the likelihoods" in " ".join(
        text.getvalue().split()
    )


@pytest.mark.parametrize("name", ["short", "words"])
def test_predictions_do_not_depend_on_targets(base: InferenceBase, name: str) -> None:
    labeled, unlabeled = base.score(ROWS, name), base.score(UNLABELED, name)
    assert [a.prediction for a in labeled] == [b.prediction for b in unlabeled]
    torch.testing.assert_close(
        [a.log_probability for a in labeled], [b.log_probability for b in unlabeled]
    )
    assert {b.nll for b in unlabeled} == {None}
    empty = [{**row, "label": ""} for row in ROWS]
    ignored = base.score(empty, name, use_targets=False)
    assert [a.prediction for a in ignored] == [b.prediction for b in unlabeled]


def test_generated_text_equals_that_of_transformers(run: Run, base: InferenceBase) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(TINY)
    tokenizer, prompt_PH = load_tokenizer(), run.prompts["words"].tensor
    expected = []
    for text in TEXTS:
        ids = torch.tensor(tokenizer(f"{text}\nAnswer:")["input_ids"])
        embeds = torch.cat([prompt_PH, model.get_input_embeddings()(ids)])[None]
        mask = torch.ones(embeds.shape[:2], dtype=torch.long)
        with torch.no_grad():
            output = model.generate(
                inputs_embeds=embeds, attention_mask=mask, do_sample=False, max_new_tokens=6
            )
        expected.append(tokenizer.decode(output[0], skip_special_tokens=True).strip())
    assert all(expected)
    assert base.generate(TEXTS, "words") == expected
    assert base.generate(TEXTS[0], "words") == expected[0]
    assert base.generate(TEXTS[0], run.prompts["words"]) == expected[0]


def test_the_probability_of_a_generated_text_is_that_of_its_tokens(base: InferenceBase) -> None:
    (made,) = base.score(UNLABELED[:1], "words")
    request = base.text_request(TEXTS[0], "words")
    assert isinstance(made.prediction, str)
    tokenizer = load_tokenizer()
    model: Any = AutoModelForCausalLM.from_pretrained(TINY)
    assert request.prompt is not None
    ids = [*request.input_ids]
    total = 0.0
    for _ in range(request.max_new_tokens):
        embeds = torch.cat(
            [request.prompt.tensor, model.get_input_embeddings()(torch.tensor(ids))]
        )[None]
        with torch.no_grad():
            logits = model(inputs_embeds=embeds).logits[0, -1].log_softmax(-1)
        total += logits.max().item()
        ids.append(int(logits.argmax()))
        if ids[-1] in request.stop.token_ids:
            break
    assert tokenizer.decode(ids[len(request.input_ids) :]).startswith(made.prediction)
    assert made.log_probability == pytest.approx(total, abs=1e-3)


def test_several_bases_are_open_in_one_process(base: InferenceBase) -> None:
    before = base.generate(TEXTS[0], "words")
    with load_base(TINY) as other:
        assert isinstance(other.generate(TEXTS[0], max_new_tokens=3), str)
        with pytest.raises(BadInput, match="loaded without a run"):
            other.generate(TEXTS[0], "words")
    with pytest.raises(BadInput, match="the base is closed; load it again"):
        other.generate(TEXTS[0])
    assert base.generate(TEXTS[0], "words") == before


def test_the_example_runs_as_a_script(
    run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    script = TINY.parent / "python_api.py"
    monkeypatch.setattr(sys, "argv", [str(script), str(run.folder)])
    runpy.run_path(str(script))
    shown = capsys.readouterr().out
    assert "<prompt 'short': task 'triage', prompt_tuning, 3 virtual tokens" in shown
    assert "torch.Size([3, 128])" in shown
    assert shown.count("Chest pain since noon. -> ") == 2


def test_the_oldest_turns_of_a_dialogue_are_left_out(base: InferenceBase) -> None:
    talk = [{"role": "user", "content": "Chest pain. " * 20}, {"role": "assistant", "content": "a"}]
    last = {"role": "user", "content": "A cough."}
    system = {"role": "system", "content": "Be brief."}
    question = Question(1, "long", [system, *(talk * 9), last], max_new_tokens=8)
    request, dropped = make_request(base, question)
    assert 0 < dropped < 18
    assert dropped % 2 == 0
    kept = replace(question, dialogue=[system, *(talk * 9)[dropped:], last])
    assert make_request(base, kept) == (request, 0)
    fuller = replace(question, dialogue=[system, *(talk * 9)[dropped - 2 :], last])
    assert make_request(base, fuller) == (request, 2)
    long = [last | {"content": "Chest pain. " * 900}]
    refused = r"^message: has .* must have 1 to .* lower --max-new-tokens$"
    for in_dialogue in (True, False):
        with pytest.raises(BadInput, match=refused):
            make_request(base, Question(1, "long", long, chat_template=in_dialogue))


def test_a_chat_ends_with_the_error_of_its_decoder(
    base: InferenceBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(*_: object) -> None:
        raise MemoryError("of the GPU")

    monkeypatch.setattr(DecodingBatch, "forward", forward)
    ours, theirs = map(Channel, socket.socketpair())
    answers = Answers(base, StreamingDecoder(base.engine, base.loaded.model), theirs)
    with ours.socket, theirs.socket, ThreadPoolExecutor() as threads:
        ran = threads.submit(answers.run)
        ours.receive()  # the base is loaded
        question = {"role": "user", "content": "A cough."}
        ours.send(Question(1, dialogue=[question], chat_template=False, max_new_tokens=4))
        reply = ours.receive()
        assert reply is not None
        assert reply["finish"] == "failed"
        ours.socket.shutdown(socket.SHUT_RDWR)
        with pytest.raises(MemoryError, match="of the GPU"):
            ran.result(20)


def test_a_prompt_of_another_run_leaves_less_room_for_rows(run: Run, base: InferenceBase) -> None:
    long = replace(
        run.prompts["long"],
        settings=run.prompts["long"].settings.model_copy(update={"num_virtual_tokens": 100}),
    )
    rows = [{"text": "x " * 440}]
    assert len(base.score(rows, "long")) == 1
    with pytest.raises(BadInput, match="412 fit"):
        base.score(rows, long)


def test_mistakes_are_reported_with_their_remedy(run: Run, base: InferenceBase) -> None:
    with pytest.raises(BadInput, match=r"no prompt 'shrt' \(did you mean 'short'\?\)"):
        base.generate("A cough.", "shrt")
    with pytest.raises(BadInput, match="prompt 'unfinished' is not saved yet"):
        run.prompts["unfinished"]
    with pytest.raises(BadInput, match="without a prompt, name one of triage, free"):
        base.generate("A cough.")
    with pytest.raises(BadInput, match=r"^max_new_tokens: 0 is not a number of at least 1"):
        base.generate("A cough.", "short", max_new_tokens=0)
    with pytest.raises(BadInput, match=r"^max_new_tokens: 100000 leaves no room"):
        base.generate("A cough.", "short", max_new_tokens=100_000)
    with pytest.raises(BadInput, match=r"^texts\[1\]: has .* shorten it or lower max_new_tokens$"):
        base.generate(["A cough.", "A cough. " * 500], "short")
    two_columns = run.prompts["short"].task.model_copy(update={"input": "{a}{virtual_tokens}{b}"})
    with pytest.raises(BadInput, match=r"^text: the template of task 'triage' has 2 columns"):
        text_request(base.files, two_columns, "x", None, "front", 4, None)
    tokenizer = copy.deepcopy(base.tokenizer)
    tokenizer.add_tokens("<later>")
    files = replace(base.files, tokenizer=tokenizer)
    with pytest.raises(BadInput, match=r"text: contains '<later>'.* has no embedding"):
        text_request(files, run.prompts["short"].task, "A <later> cough.", None, "front", 4, None)
    with pytest.raises(BadInput, match="rows: row 2: label: 'none' is not one of"):
        base.score([ROWS[0], {"text": "x", "label": "none"}], "short")
    with pytest.raises(BadInput, match="no column 'text'"):
        base.score([{"note": "x"}], "short")


@pytest.mark.parametrize(
    ("shape", "problem"),
    [
        ((3, 4, 32), "of 3 layers, 4 heads of size 32, and the base has 4 layers"),
        ((5, 4, 32), "of 5 layers"),
        ((4, 2, 32), "of 4 layers, 2 heads of size 32, and the base has 4 layers, 4 heads"),
        ((4, 8, 16), "8 heads of size 16"),
    ],
)
def test_keys_and_values_of_another_base_are_refused(
    tmp_path: Path, base: InferenceBase, shape: tuple[int, int, int], problem: str
) -> None:
    num_layers, heads, head_size = shape
    prompt = PrefixKeyValues(torch.ones(2, num_layers, 2, heads, head_size))
    save_peft(tmp_path, prompt, str(TINY), num_layers=num_layers, num_attention_heads=4)
    with pytest.raises(BadInput, match=problem):
        load_prompts([tmp_path], base.files, torch.device("cpu"))


def test_folders_without_prompts_are_refused(tmp_path: Path, run: Run) -> None:
    with pytest.raises(BadInput, match="no such folder"):
        load_run(tmp_path / "missing")
    with pytest.raises(BadInput, match=r"has no run\.yaml"):
        load_run(tmp_path)
    (tmp_path / "run.yaml").write_bytes((run.folder / "run.yaml").read_bytes())
    with pytest.raises(BadInput, match="has no finished prompt"):
        load_run(tmp_path)


def test_a_base_with_other_content_is_refused(tmp_path: Path, run: Run) -> None:
    folder = save_run(tmp_path / "out")
    state = {"identity": {"base.model, its weights": "0" * 64}}
    (folder / "checkpoints" / "step-00000004").mkdir(parents=True)
    (folder / "checkpoints" / "step-00000004" / "state.json").write_text(json.dumps(state))
    with pytest.raises(BadInput, match="is not the base that the prompts were trained for"):
        load_base(load_run(folder))
