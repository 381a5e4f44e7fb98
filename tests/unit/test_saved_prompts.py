"""Prompts to start from: what is found in a folder, and how every mistake is worded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptEncoderConfig, get_peft_model
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from tests.soft_prompts import soft_prompts
from trainer.config import RunConfig
from trainer.prompts.peft_adapter import load_peft, save_peft
from trainer.prompts.saved_prompts import check_sources, find_source, source_problems
from trainer.runtime.errors import BadInput

P, H = 3, 8


def save(folder: Path, prompt: torch.Tensor | None = None) -> Path:
    prompt = torch.ones(P, H) if prompt is None else prompt
    save_peft(folder, soft_prompts([prompt])[0], "base", num_layers=2, num_attention_heads=2)
    return folder


def run_of(folder: Path, **prompt: Any) -> RunConfig:
    task = {"name": "t", "train": "t.jsonl", "input": "{text}", "target": "{label}"}
    start = {"name": "new", "task": "t", "init": {"from": str(folder)}, **prompt}
    return RunConfig.model_validate(
        {
            "output_dir": "runs/test",
            "base": {"model": "tiny"},
            "tasks": [task],
            "prompts": [start],
            "training": {"steps": 3},
        }
    )


def problem_of(folder: Path, hidden_size: int | None = None, **prompt: Any) -> str:
    (problem,) = source_problems(run_of(folder, **prompt), hidden_size)
    start = "prompts.new.init.from: "
    assert problem.startswith(start)
    return problem.removeprefix(start)


def test_trained_prompts_are_located_in_run_folders(tmp_path: Path) -> None:
    source = find_source(str(save(tmp_path / "a")))
    assert (source.prefix, source.num_virtual_tokens, source.width) == (False, P, H)
    source = find_source(str(save(tmp_path / "b", torch.ones(P, 2, 2, 1, 4))))
    assert (source.prefix, source.num_virtual_tokens, source.width) == (True, P, 16)
    assert list(source_problems(run_of(tmp_path / "a"), H)) == []
    assert list(source_problems(run_of(tmp_path / "a", method="p_tuning"), H)) == []
    assert list(source_problems(run_of(tmp_path / "b", method="prefix_tuning"), H)) == []


def test_adapters_saved_by_peft_are_read(tmp_path: Path) -> None:
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16,
            hidden_size=H,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
    )
    settings = PromptEncoderConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=P, encoder_hidden_size=4
    )
    model = get_peft_model(base, settings)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    source = find_source(str(tmp_path))
    assert (source.prefix, source.num_virtual_tokens, source.width) == (False, P, H)
    torch.testing.assert_close(load_peft(tmp_path).tensor, model.get_prompt(1)[0].detach())


def test_a_run_of_several_prompts_is_asked_for_one(tmp_path: Path) -> None:
    assert find_source(str(save(tmp_path / "prompts" / "one").parents[1])).width == H
    save(tmp_path / "prompts" / "two")
    with pytest.raises(BadInput, match=r"several prompts; name one: .*NAME of one, two"):
        find_source(str(tmp_path))


def test_other_methods_and_widths_are_refused(tmp_path: Path) -> None:
    tokens, keys = save(tmp_path / "a"), save(tmp_path / "b", torch.ones(P, 2, 2, 1, 4))
    assert "holds virtual tokens, but the method is prefix_tuning; use prompt_tuning or" in (
        problem_of(tokens, method="prefix_tuning")
    )
    assert "holds keys and values, but the method is p_tuning; use prefix_tuning" in (
        problem_of(keys, method="p_tuning")
    )
    assert "of width 8, but the base has 16; name a prompt of this base" in problem_of(tokens, 16)
    with pytest.raises(BadInput, match="but the base has 16"):
        check_sources(run_of(tokens), 16)


def test_folders_without_a_prompt_are_refused(tmp_path: Path) -> None:
    assert "no such folder; give an adapter's folder" in problem_of(tmp_path / "none")
    assert "has no adapter_config.json, so it is not an adapter" in problem_of(tmp_path)
    LoraConfig(task_type="CAUSAL_LM").save_pretrained(tmp_path)
    assert "is an adapter of type 'LORA', which has no prompt" in problem_of(tmp_path)
    save(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:20])
    assert "is not a valid safetensors file of an adapter" in problem_of(tmp_path)
    save_file({"other": torch.ones(2)}, weights)
    assert "has no tensor 'prompt_embeddings'" in problem_of(tmp_path)
    save_file({"prompt_embeddings": torch.ones(0, H)}, weights)
    assert "has no virtual tokens" in problem_of(tmp_path)
    weights.unlink()
    assert "has no adapter_model.safetensors; train it first" in problem_of(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(["no", "mapping"]))
    assert "adapter_config.json: must be a JSON object, not a list" in problem_of(tmp_path)
    (tmp_path / "adapter_config.json").write_text("[" * 100_000)
    assert "nested deeper than 200 levels; export the prompt again" in problem_of(tmp_path)


@pytest.mark.parametrize(
    "header",
    [b"[" * 100_000, b"[]", b'{"prompt_embeddings": {"shape": [1, "a"]}}', b'{"a": "\xff"}'],
)
def test_damaged_headers_are_refused(tmp_path: Path, header: bytes) -> None:
    save(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(len(header).to_bytes(8, "little") + header)
    assert str(weights) in problem_of(tmp_path)


def test_a_pickle_is_never_read(tmp_path: Path) -> None:
    save(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    assert "save it as safetensors: pickles can run code" in problem_of(tmp_path)
