"""Invariant 7: what is exported gives the same logits in PEFT."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM, PeftModel, PromptTuningConfig
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from transformers import LlamaConfig, LlamaForCausalLM

from trainer.config import Base
from trainer.model.checkpoint_files import portable_name
from trainer.prompts.peft_adapter import load_peft, save_peft
from trainer.prompts.soft_prompt import VirtualTokens
from trainer.runtime.errors import BadInput

P, H, V, L, HEADS = 5, 16, 30, 2, 4


@pytest.fixture
def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=H,
        intermediate_size=32,
        num_hidden_layers=L,
        num_attention_heads=HEADS,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


def export(folder: Path, prompt_PH: torch.Tensor, name: str, **more: Any) -> None:
    save_peft(
        folder, VirtualTokens(prompt_PH), name, num_layers=L, num_attention_heads=HEADS, **more
    )


def test_peft_gives_the_same_logits(tmp_path: Path, base: LlamaForCausalLM) -> None:
    base.save_pretrained(tmp_path / "base")
    prompt_PH = torch.randn(P, H)
    export(tmp_path / "adapter", prompt_PH, str(tmp_path / "base"))
    ids_BT = torch.randint(0, V, (3, 7))
    with torch.no_grad():
        words_BTH = base.get_input_embeddings()(ids_BT)
        joined = torch.cat([prompt_PH.expand(3, P, H), words_BTH], dim=1)
        expected = base(inputs_embeds=joined).logits
        plain = LlamaForCausalLM.from_pretrained(tmp_path / "base")
        model = PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
        logits = model(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT)).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-6)


def test_a_base_in_a_folder_is_found_from_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: LlamaForCausalLM
) -> None:
    """By AutoPeftModel and by the lines of the model card, after the run named it relatively."""
    base.save_pretrained(tmp_path / "base")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    export(Path("adapter"), torch.randn(P, H), portable_name(Base(model="base")))
    monkeypatch.chdir(tmp_path / "elsewhere")
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    paths: dict[str, Any] = {}
    exec((tmp_path / "adapter" / "README.md").read_text().split("```")[1][len("python") :], paths)
    ids = torch.randint(0, V, (1, 4))
    with torch.no_grad():
        logits = [m.eval()(input_ids=ids).logits for m in (model, paths["model"])]
    assert torch.equal(*logits)


def test_a_hub_id_is_exported_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert portable_name(Base(model="org/name")) == "org/name"


def test_peft_generates_with_it(tmp_path: Path, base: LlamaForCausalLM) -> None:
    export(tmp_path, torch.randn(P, H), "base")
    model = PeftModel.from_pretrained(base, tmp_path).eval()
    ids = torch.randint(0, V, (1, 4))
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False
    )
    assert out.shape[1] > 4


def test_files_are_those_that_peft_writes(tmp_path: Path) -> None:
    prompt_PH = torch.randn(P, H)
    export(tmp_path, prompt_PH, "org/name", revision="abc")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert list(tensors) == ["prompt_embeddings"]
    assert torch.equal(tensors["prompt_embeddings"], prompt_PH)
    config = PromptTuningConfig.from_pretrained(tmp_path)
    assert (config.num_virtual_tokens, config.token_dim) == (P, H)
    assert (config.num_layers, config.num_attention_heads) == (L, HEADS)
    assert (config.base_model_name_or_path, config.revision) == ("org/name", "abc")
    assert config.inference_mode
    assert config.task_type == "CAUSAL_LM"
    known = set(PromptTuningConfig().to_dict())
    assert set(json.loads((tmp_path / "adapter_config.json").read_text())) <= known


def test_the_model_card_loads_a_gguf_file_as_transformers_does(tmp_path: Path) -> None:
    prompt = VirtualTokens(torch.ones(5, 8))
    save_peft(tmp_path / "a", prompt, "/models/m.Q4_1.gguf", num_layers=2, num_attention_heads=4)
    card = (tmp_path / "a" / "README.md").read_text()
    assert "from_pretrained('/models', gguf_file='m.Q4_1.gguf')" in card


def test_model_card(tmp_path: Path) -> None:
    name = 'C:\\models\\"tiny": base'
    export(tmp_path / "triage", torch.randn(P, H), name, description="Accuracy 0.93.")
    card = (tmp_path / "triage" / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["base_model"] == name
    assert header["library_name"] == "peft"
    assert "# triage" in card
    assert "Accuracy 0.93." in card
    assert "5 virtual tokens" in card
    export(tmp_path / "last", torch.randn(P, H), name, title="triage, last")
    assert "# triage, last\n" in (tmp_path / "last" / "README.md").read_text()


def test_exporting_again_replaces(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        export(tmp_path, torch.full((P, H), value, dtype=torch.float64), "base")
    tensor = load_file(tmp_path / "adapter_model.safetensors")["prompt_embeddings"]
    assert tensor.dtype == torch.float32
    assert bool((tensor == 2).all())
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_not_finite_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not finite"):
        export(tmp_path, torch.full((P, H), float("nan")), "base")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("adapter_model.safetensors", b""),
        ("adapter_model.safetensors", b"\xff" * 64),
        ("adapter_model.safetensors", to_bytes({"other": torch.ones(2, 2)})),
        ("adapter_config.json", b"[]"),
        ("adapter_config.json", b"{}"),
        ("adapter_config.json", b'{"peft_type": "PREFIX_TUNING", "num_layers": 3}'),
        (
            "adapter_config.json",
            b'{"peft_type": "PREFIX_TUNING", "num_layers": 3, "num_attention_heads": 7}',
        ),
        ("adapter_config.json", None),
        ("adapter_model.safetensors", None),
    ],
)
def test_a_damaged_adapter_is_refused(tmp_path: Path, name: str, content: bytes | None) -> None:
    export(tmp_path, torch.ones(4, 8), "base")
    path = tmp_path / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadInput, match=re.escape(str(tmp_path))):
        load_peft(tmp_path)
