"""``promptshard export --to``: every file, read as its program documents it, gives our numbers."""

from __future__ import annotations

import ast
import base64
import importlib.util
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.unsharded_base import load_unsharded
from tests.family_bases import save_family
from tests.tokenizers_of_families import make_tokenizer
from trainer import config as run_files
from trainer.commands.export_prompt import export_prompt
from trainer.config import Base, RunConfig, Task
from trainer.data.token_table import Example
from trainer.data.tokenization.dialogue_rows import dialogue_encoder
from trainer.data.tokenization.message_edits import with_mark, with_system
from trainer.data.tokenization.tokenize import encode_request
from trainer.model.checkpoint_files import open_base
from trainer.model.embedding_lookup import read_token_embeddings
from trainer.packing.packed_batch import build_packed_batch
from trainer.packing.packed_row import PackedRow
from trainer.prompts.adapter_files import PromptAdapter, read_adapter
from trainer.prompts.formats.target_names import TARGET_NAMES
from trainer.prompts.peft_adapter import FixedText, load_peft, save_peft
from trainer.prompts.saved_prompts import find_source
from trainer.prompts.soft_prompt import PrefixKeyValues, SoftPrompt, VirtualTokens
from trainer.runtime import atomic_io
from trainer.runtime.console import Console
from trainer.runtime.errors import BadInput

TINY = run_files.resolve_path("examples/tiny_base")
P = 4
TEXTS = ("Takes insulin every day.", "  Two words\n", "naïve – 3 dogs")
#: Settings of a task, and the position of its prompt.
PLACES: dict[str, tuple[dict[str, Any], str]] = {
    "front": ({}, "front"),
    "template": ({"input": "Note: {virtual_tokens} read {text}\nAnswer:"}, "front"),
    "after the text": ({"input": "{text}\n{virtual_tokens}Answer:"}, "front"),
    "optional": (
        {"input": "{text}\n{more}\n{virtual_tokens}Answer:", "optional": ["more"]},
        "front",
    ),
    "chat, front": ({"chat": True}, "front"),
    "chat, system": ({"chat": True}, "system"),
    "chat, user": ({"chat": True}, "user"),
    "chat, system text": ({"chat": True, "system": "Sort the note."}, "system"),
    "chat, template": ({"chat": True, "input": "Read {virtual_tokens}: {text}"}, "front"),
}
IN_TURNS = [name for name in PLACES if name.startswith("chat") and name != "chat, front"]


def write_run(
    folder: Path, place: str = "front", base: Path = TINY, prompt: SoftPrompt | None = None
) -> Path:
    """Write what a finished run has in its output folder, as far as exports read it."""
    changed, position = PLACES[place]
    settings = {"name": "t", "train": "t.jsonl", "input": "{text}\nAnswer:", "target": " {label}"}
    config = RunConfig.model_validate(
        {
            "output_dir": str(folder),
            "base": {"model": str(base)},
            "tasks": [settings | changed],
            "prompts": [
                {"name": name, "task": "t", "position": position, "num_virtual_tokens": P}
                for name in ("p", "unfinished")
            ],
            "training": {"steps": 1},
        }
    )
    folder.mkdir(parents=True)
    atomic_io.write(folder / "run.yaml", run_files.dump(config))
    atomic_io.write_json(folder / "environment.json", {"dtype": "float32"})
    fixed = None
    if prompt is None:
        prompt = VirtualTokens(virtual_tokens())
        before = leading(config.task("t"), position)
        if before:
            fixed = FixedText(tuple(before), len(before), words(before), ("", ""))
    save_peft(
        *(folder / "prompts" / "p", prompt, str(base)),
        num_layers=2,
        num_attention_heads=4,
        fixed_text=fixed,
    )
    return folder


@cache
def virtual_tokens() -> Tensor:
    return torch.randn(P, 128, generator=torch.Generator().manual_seed(0)) * 0.02


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY)


@cache
def plain() -> Any:
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()


def words(ids: list[int]) -> Tensor:
    with torch.no_grad():
        rows: Tensor = plain().get_input_embeddings()(torch.tensor(ids, dtype=torch.long))
    return rows


def leading(task: Task, position: str) -> list[int]:
    """Token ids before the virtual tokens, if they do not depend on the text."""
    both = [encode_request(tokenizer(), task, text, position=position) for text in ("x", "other")]
    (first, at), (second, other) = both
    return first[:at] if at == other and first[:at] == second[:at] else []


def export(run: Path, out: Path, to: str, peft_type: str | None = None, name: str = "p") -> str:
    console = Console(shown := io.StringIO(), io.StringIO())
    export_prompt(run, out, name, to, peft_type, console)
    return shown.getvalue()


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path, str], ModuleType]]:
    """Import scripts from an exported folder, as they run there."""

    def load(folder: Path, name: str) -> ModuleType:
        monkeypatch.syspath_prepend(str(folder))
        monkeypatch.delitem(sys.modules, "prompt_stream", raising=False)
        spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    yield load
    sys.modules.pop("prompt_stream", None)


def expected(run: Path, text: str) -> tuple[list[int], int, Tensor]:
    """Token ids, place and input embeddings of the training."""
    config = run_files.load_output(run)
    prompt, task = config.prompts[0], config.tasks[0]
    ids, at = encode_request(tokenizer(), task, text, position=prompt.position)
    return ids, at, torch.cat([words(ids[:at]), virtual_tokens(), words(ids[at:])])


def decoded(data: str) -> Tensor:
    """Read a tensor as vLLM's ``safe_load_prompt_embeds`` does."""
    content = io.BytesIO(base64.b64decode(data, validate=True))
    tensor: Tensor = torch.load(content, weights_only=True, map_location="cpu")
    assert tensor.dim() == 2
    assert tensor.dtype.is_floating_point
    return tensor


def vllm_chat_stream(body: Mapping[str, Any]) -> tuple[list[int], Tensor, list[bool]]:
    """Token ids, embeddings and mask that vLLM makes of a chat request.

    By the rules of ``vllm/renderers/hf.py``: each part is one placeholder token in the rendered
    and tokenized dialogue. It is repeated for every row of the tensor and then replaced by the row.
    Where the mask is true, the model embeds the token id.
    """
    reader = AutoTokenizer.from_pretrained(TINY)
    reader.add_special_tokens({"additional_special_tokens": ["<prompt_embeds>"]})
    placeholder = reader.convert_tokens_to_ids("<prompt_embeds>")
    tensors, messages = [], []
    for turn in body["messages"]:
        parts = turn["content"]
        if isinstance(parts, str):
            parts = [{"type": "text", "text": parts}]
        shown = []
        for part in parts:
            if part["type"] == "prompt_embeds":
                tensors.append(decoded(part["data"]))
            shown.append("<prompt_embeds>" if part["type"] == "prompt_embeds" else part["text"])
        messages.append({"role": turn["role"], "content": "\n".join(shown)})  # format "string"
    text = reader.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **body.get("chat_template_kwargs", {})
    )
    ids, rows, mask = [], [], []
    for i in reader(text, add_special_tokens=False)["input_ids"]:
        tensor = tensors.pop(0) if i == placeholder else torch.zeros(1, 128)
        ids += [i] * len(tensor)
        rows.append(tensor)
        mask += [i != placeholder] * len(tensor)
    assert not tensors
    return ids, torch.cat(rows), mask


@pytest.mark.parametrize("place", PLACES)
def test_vllm_reads_the_stream_of_the_training(
    tmp_path: Path, place: str, scripts: Callable[[Path, str], ModuleType]
) -> None:
    """Position by position: in Completions, and in Chat where the virtual tokens are in a turn."""
    run = write_run(tmp_path / "run", place)
    export(run, tmp_path / "out", "vllm")
    client = scripts(tmp_path / "out", "vllm_client")
    stream = client.PromptStream()
    for text in TEXTS:
        ids, at, embeddings = expected(run, text)
        assert stream.ids(text) == (ids, at)
        body = client.completion_body(stream, text, "m")
        assert "prompt" not in body
        assert torch.equal(decoded(body["prompt_embeds"]), embeddings)
    if place in IN_TURNS:
        fresh = client.PromptStream()
        read, rows, mask = vllm_chat_stream(client.chat_body(fresh, TEXTS[0], "m"))
        ids, at, embeddings = expected(run, TEXTS[0])
        assert len(mask) == len(embeddings)
        for i, is_token in enumerate(mask):
            row = words([read[i]])[0] if is_token else rows[i]
            assert torch.equal(row, embeddings[i]), i
        assert mask.count(False) >= P
    else:
        with pytest.raises(ValueError, match="Chat API"):
            client.chat_body(client.PromptStream(), TEXTS[0], "m")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "vllm serve" in card
    assert "--enable-prompt-embeds" in card
    assert ("Chat Completions API cannot be used" in card) == (place not in IN_TURNS)


def test_optional_columns_of_a_request_may_be_missing(
    tmp_path: Path, scripts: Callable[[Path, str], ModuleType]
) -> None:
    run = write_run(tmp_path / "run", "optional")
    export(run, tmp_path / "out", "tensorrt-llm")
    stream = scripts(tmp_path / "out", "tensorrt_llm_input").PromptStream()
    of_text = stream.ids("A note.")
    assert of_text == encode_request(tokenizer(), run_files.load_output(run).tasks[0], "A note.")
    assert tokenizer().decode(of_text[0]).endswith("A note.\n\nAnswer:")
    for row in ({}, {"more": None}, {"more": ""}):
        assert stream.ids({"text": "A note."} | row) == of_text
    assert stream.ids({"text": "A note.", "more": "Ask."}) != of_text


@pytest.mark.parametrize("kind", ["llama", "prepend", "first", "gpt2", "llama3"])
@pytest.mark.parametrize("place", ["front", "template", "after the text"])
def test_the_script_tokenizes_as_the_training_with_any_tokenizer(
    tmp_path: Path, kind: str, place: str, scripts: Callable[[Path, str], ModuleType]
) -> None:
    run = write_run(tmp_path / "run", place)
    export(run, tmp_path / "out", "tensorrt-llm")
    stream = scripts(tmp_path / "out", "tensorrt_llm_input").PromptStream()
    other = make_tokenizer(kind, [*TEXTS, "Note: read Answer:"])
    stream.tokenizer, stream._unknown = other, other.unk_token_id
    config = run_files.load_output(run)
    for text in TEXTS:
        assert stream.ids(text) == encode_request(other, config.tasks[0], text)


def test_the_exported_request_gives_the_loss_of_training_and_of_peft(
    tmp_path: Path, scripts: Callable[[Path, str], ModuleType]
) -> None:
    """transformers on the exported embeddings, our packed base, and PEFT agree."""
    run = write_run(tmp_path / "run")
    export(run, tmp_path / "vllm", "vllm")
    export(run, tmp_path / "peft", "peft")
    client = scripts(tmp_path / "vllm", "vllm_client")
    stream = client.PromptStream()
    base = load_unsharded(TINY, "none")
    model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32), tmp_path / "peft"
    ).eval()
    for text in TEXTS:
        ids, at, _ = expected(run, text)
        target = tokenizer()(" cardiac")["input_ids"]
        label = torch.tensor(target)
        rows = decoded(client.completion_body(stream, text, "m")["prompt_embeds"])
        with torch.no_grad():
            joined = torch.cat([rows, words(target)])[None]
            logits = plain()(inputs_embeds=joined).logits[0, -len(target) - 1 : -1]
            own = torch.tensor([[*ids, *target]])
            theirs = model(input_ids=own).logits[0, -len(target) - 1 : -1]
        example = Example((*ids, *target), ((len(ids), len(ids) + len(target)),), 0, at, at, ())
        batch = build_packed_batch([PackedRow(example, 0, 0)], [P])
        loss_N = base(batch, [VirtualTokens(virtual_tokens())]).losses.loss_N
        wanted = cross_entropy(logits, label, reduction="none")
        torch.testing.assert_close(loss_N, wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(theirs, logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("place", ["front", "chat, system text"])
def test_other_targets_read_the_stream_of_the_training(
    tmp_path: Path, place: str, scripts: Callable[[Path, str], ModuleType]
) -> None:
    run = write_run(tmp_path / "run", place)
    ids, at, embeddings = expected(run, TEXTS[0])

    export(run, tmp_path / "sglang", "sglang")
    client = scripts(tmp_path / "sglang", "sglang_client")
    body = json.loads(json.dumps(client.generate_body(client.PromptStream(), TEXTS[0])))
    assert torch.equal(torch.tensor(body["input_embeds"]), embeddings)
    assert body["sampling_params"]["max_new_tokens"] == 64

    export(run, tmp_path / "trt", "tensorrt-llm")
    script = scripts(tmp_path / "trt", "tensorrt_llm_input")
    table = torch.from_numpy(np.load(tmp_path / "trt" / "prompt_table.npy"))
    assert table.shape == (1, P, 128)
    vocab = plain().config.vocab_size  # as ``PromptTuningEmbedding``: ids from here on are rows
    made = [
        table[0, i - vocab] if i >= vocab else words([i])[0]
        for i in script.input_ids(script.PromptStream(), TEXTS[0])
    ]
    assert torch.equal(torch.stack(made), embeddings)

    export(run, tmp_path / "llama", "llama-cpp")
    example = scripts(tmp_path / "llama", "llama_cpp_example")
    calls: list[Tensor] = []

    def get_one(tokens: Any, count: int) -> SimpleNamespace:
        return SimpleNamespace(rows=words(list(tokens)[:count]))

    def batch(*, n_tokens: int, embd: Any, **others: Any) -> SimpleNamespace:
        assert set(others.values()) == {None}
        rows = torch.tensor(embd[: n_tokens * 128]).view(n_tokens, 128)
        return SimpleNamespace(rows=rows)

    def decode(context: object, given: SimpleNamespace) -> int:
        calls.append(given.rows)
        return 0

    library = SimpleNamespace(llama_batch_get_one=get_one, llama_batch=batch, llama_decode=decode)
    stream = example.PromptStream()
    example.decode_input(library, None, stream, *stream.ids(TEXTS[0]))
    assert len(calls) == 3 - (at == 0)
    assert torch.equal(torch.cat(calls), embeddings)
    raw = np.fromfile(tmp_path / "llama" / "virtual_tokens.f32", "<f4").reshape(P, 128)
    assert torch.equal(torch.from_numpy(raw), virtual_tokens())

    export(run, tmp_path / "npz", "npz")
    with np.load(tmp_path / "npz" / "prompt.npz") as arrays:
        metadata = json.loads(str(arrays["metadata"]))
        assert torch.equal(torch.from_numpy(arrays["virtual_tokens"]), virtual_tokens())
        before = arrays["fixed_ids_before"].tolist()
        assert before == ids[: len(before)]
    assert metadata["base_model"] == str(TINY.resolve())
    assert metadata["position"] == run_files.load_output(run).prompts[0].position


@pytest.mark.parametrize(("case", "multiplied"), [("gemma", True), ("gemma3", False)])
def test_a_base_that_scales_embeddings_reads_the_same_in_vllm(
    tmp_path: Path, case: str, multiplied: bool, scripts: Callable[[Path, str], ModuleType]
) -> None:
    """vLLM multiplies ``inputs_embeds`` by the factor for Gemma 1 and 2, but not for Gemma 3."""
    base = save_family(tmp_path / "base", case)
    hidden = json.loads((base / "config.json").read_text())["hidden_size"]
    prompt_PH = torch.randn(P, hidden)
    run = write_run(tmp_path / "run", base=base, prompt=VirtualTokens(prompt_PH))
    export(run, tmp_path / "out", "vllm")
    client = scripts(tmp_path / "out", "vllm_client")
    stream = client.PromptStream()
    sent = decoded(client.completion_body(stream, "a b", "m")["prompt_embeds"])
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    ids, _ = stream.ids("a b")
    with torch.no_grad():
        embedded = model.get_input_embeddings()(torch.tensor(ids))
    read = sent * hidden**0.5 if multiplied else sent
    torch.testing.assert_close(read, torch.cat([prompt_PH, embedded]), rtol=1e-6, atol=1e-6)
    with pytest.raises(BadInput, match="TensorRT-LLM does so with embeddings"):
        export(run, tmp_path / "trt", "tensorrt-llm")


def test_the_code_of_the_readmes_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it that needs neither a server nor a program that is not installed."""
    run = write_run(tmp_path / "run", base=TINY.resolve())
    ids, at, _ = expected(run, "A text.")

    def blocks(target: str, language: str) -> list[str]:
        export(run, tmp_path / target, target)
        monkeypatch.chdir(tmp_path / target)
        return re.findall(rf"```{language}\n(.*?)```", Path("README.md").read_text(), re.DOTALL)

    def output(commands: list[str], begin: str) -> str:
        (command,) = (text for text in commands if text.startswith(begin))
        line = command.splitlines()[0].replace('"..."', '"A text."').partition(" > ")[0]
        arguments = [sys.executable, *shlex.split(line)[1:]]
        return subprocess.run(arguments, capture_output=True, text=True, check=True).stdout

    names: dict[str, Any] = {}
    for target in ("npz", "peft"):
        (code,) = blocks(target, "python")
        exec(code, names)
    assert torch.equal(torch.from_numpy(names["virtual_tokens"]), virtual_tokens())
    assert torch.equal(names["model"].get_prompt(1)[0], virtual_tokens())
    rows = range(plain().config.vocab_size, plain().config.vocab_size + P)
    made = output(blocks("tensorrt-llm", "bash"), "python tensorrt_llm_input.py")
    assert list(map(int, made.split(","))) == [*ids[:at], *rows, *ids[at:]]
    made = output(blocks("llama-cpp", "bash"), "python -c")
    assert ast.literal_eval(made) == (ids, at)


def test_keys_and_values(tmp_path: Path) -> None:
    """PEFT reads them as PREFIX_TUNING and as CARTRIDGE; targets of embeddings refuse them."""
    base = save_family(tmp_path / "base", "llama")
    past = torch.randn(P, 2, 2, 2, 12) * 0.3
    run = write_run(tmp_path / "run", base=base, prompt=PrefixKeyValues(past))
    ids = torch.tensor([[3, 5, 7]])
    logits = {}
    for kind in (None, "prefix_tuning", "cartridge"):
        out = tmp_path / str(kind)
        export(run, out, "peft", kind)
        loaded = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = PeftModel.from_pretrained(loaded, out).eval()
        wanted = "CARTRIDGE" if kind == "cartridge" else "PREFIX_TUNING"
        assert model.active_peft_config.peft_type == wanted
        with torch.no_grad():
            logits[kind] = model(input_ids=ids).logits
        names: dict[str, Any] = {}  # the lines of the card load this folder
        exec((out / "README.md").read_text().split("```python\n")[1].split("```")[0], names)
        assert names["model"].active_peft_config.peft_type == wanted
        assert f"base, {str(out)!r})" in (out / "README.md").read_text()
        assert find_source(str(out)).prefix  # for ``init.from``
        assert isinstance(read_adapter(str(out), str(base)), PromptAdapter)
        assert torch.equal(load_peft(out).tensor, past)
    assert torch.equal(logits["cartridge"], logits["prefix_tuning"])
    assert torch.equal(logits[None], logits["prefix_tuning"])
    export(run, tmp_path / "npz", "npz")
    with np.load(tmp_path / "npz" / "prompt.npz") as arrays:
        assert arrays["keys"].shape == (2, P, 2, 12)
        assert np.array_equal(arrays["values"][1, 2], past[2, 1, 1].numpy())
    for target in ("vllm", "sglang", "tensorrt-llm", "llama-cpp"):
        with pytest.raises(BadInput, match="has keys and values for every layer"):
            export(run, tmp_path / target, target)
    assert not {path.name for path in tmp_path.iterdir()} & set(TARGET_NAMES) - {"npz"}


def test_texts_end_at_the_stop_strings_of_task_and_base(tmp_path: Path) -> None:
    """As with ``promptshard generate``; other programs do not read those of the base."""
    base = tmp_path / "base"
    shutil.copytree(TINY, base)
    path = base / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"stop_strings": ["END"]}))
    run = write_run(tmp_path / "run", base=base)
    own = run_files.load_output(run).tasks[0].stop
    export(run, tmp_path / "out", "vllm")
    assert json.loads((tmp_path / "out" / "prompt.json").read_text())["stop"] == [*own, "END"]


def test_bad_input_is_explained(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (tmp_path / "there").mkdir()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"to": "vlm"}, r"not a target \(did you mean 'vllm'\?\); known: peft, vllm"),
        ({"to": "npz", "name": "q"}, "not a prompt of .*known: p, unfinished"),
        ({"to": "npz", "name": "unfinished"}, "not saved yet; finish the run first"),
        ({"to": "npz", "out": tmp_path / "there"}, "already exists; give a new folder"),
        ({"to": "npz", "peft_type": "cartridge"}, "works with --to peft only"),
        ({"to": "peft", "peft_type": "cartridge"}, "leave --peft-type out"),
    ]
    for given, message in cases:
        with pytest.raises(BadInput, match=message):
            export(run, **{"out": tmp_path / "new", **given})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "there"]


def test_a_base_in_gguf_or_int8_cannot_be_read_by_rows(tmp_path: Path) -> None:
    base = save_family(tmp_path / "base", "llama")
    run = write_run(tmp_path / "run", base=base, prompt=VirtualTokens(torch.randn(P, 48)))
    (base / "model.safetensors").unlink()
    with pytest.raises(BadInput, match=r"base.model"):
        export(run, tmp_path / "out", "vllm")
    export(run, tmp_path / "npz", "npz")  # reads no weight file at all


@pytest.mark.parametrize("case", ["llama", "gpt2", "opt-projected", "gemma3", "qwen2_vl"])
def test_the_script_reads_the_embeddings_of_the_loaded_base(
    tmp_path: Path, case: str, scripts: Callable[[Path, str], ModuleType]
) -> None:
    """From one file or several, also where the text model is inside a multimodal one."""
    base = save_family(tmp_path / "base", case, max_shard_size="20KB")
    assert not (base / "model.safetensors").is_file()
    settings = Base(model=str(base))
    files, ids = open_base(settings), [7, 3, 7, 20]
    expected_nH = read_token_embeddings(files, settings, torch.float32, ids)
    prompt = VirtualTokens(torch.zeros(P, expected_nH.shape[1]))
    run = write_run(tmp_path / "run", base=base, prompt=prompt)
    target = "vllm" if case == "gemma3" else "sglang"
    export(run, tmp_path / "out", target)
    stream = scripts(tmp_path / "out", f"{target}_client").PromptStream()
    assert torch.equal(stream.rows(ids), expected_nH)


def test_requests_can_be_messages_and_rows(
    tmp_path: Path, scripts: Callable[[Path, str], ModuleType]
) -> None:
    run = write_run(tmp_path / "run", "chat, system text")
    export(run, tmp_path / "out", "tensorrt-llm")
    script = scripts(tmp_path / "out", "tensorrt_llm_input")
    stream = script.PromptStream()
    as_text = stream.ids("A note.")
    assert stream.ids({"text": "A note."}) == as_text
    turns = [{"role": "user", "content": "A note.\nAnswer:"}]
    assert stream.ids(turns) == as_text, "the task's text of the system is added"
    parsed = sys.modules["prompt_stream"].parse_request(json.dumps(turns))
    assert stream.ids(parsed) == as_text
    answer = {"role": "assistant", "content": "cardiac"}
    task = run_files.load_output(run).tasks[0]
    encoder = dialogue_encoder(tokenizer(), task)
    for start in ([], [{"role": "system", "content": "Be brief."}]):
        longer = [*start, *turns, answer, *turns]
        marked = with_mark(with_system(longer, task.system), "system")
        assert stream.ids(longer) == encoder.marked_opening(marked)
    parts = [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, *turns]
    assert stream.messages(parts) == with_mark(with_system(parts, task.system), "system")
