"""Write an int8 Llama with random weights, layer by layer: 9 GB at the shape of an 8B model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.random_base import llama_config, make_tokenizer


def make_int8_base(folder: Path, shape: dict[str, Any]) -> None:
    """Write random int8 weights and row scales, as transformers and bitsandbytes save them.

    Writes one file per layer, to hold only one layer in memory. Row scales give weights of about
    1 / sqrt(inputs), so that activations have the magnitude of a trained model's.
    """
    folder.mkdir()
    config = llama_config(**shape)
    written = json.loads(config.to_json_string()) | {
        "architectures": ["LlamaForCausalLM"],
        "quantization_config": {
            "quant_method": "bitsandbytes",
            "load_in_8bit": True,
            "llm_int8_threshold": 0.0,
            "llm_int8_skip_modules": ["lm_head"],
        },
    }
    (folder / "config.json").write_text(json.dumps(written))
    make_tokenizer().save_pretrained(folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(device).manual_seed(0)
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(_parts(shape, device, generator)):
        name = f"model-{number:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _parts(
    shape: dict[str, Any], device: torch.device, generator: torch.Generator
) -> Iterator[dict[str, torch.Tensor]]:
    hidden, vocab = shape["hidden_size"], shape["vocab_size"]

    def words() -> torch.Tensor:
        drawn = torch.randn(vocab, hidden, device=device, generator=generator) * 0.02
        return drawn.bfloat16().cpu()

    yield {"model.embed_tokens.weight": words(), "model.norm.weight": _ones(hidden)}
    yield {"lm_head.weight": words()}
    for layer in range(shape["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        part = {
            f"{prefix}.{norm}_layernorm.weight": _ones(hidden)
            for norm in ("input", "post_attention")
        }
        for name, (rows, columns) in linear_shapes(shape).items():
            weight = f"{prefix}.{name}.weight"
            part[weight] = torch.randint(
                -127, 128, (rows, columns), dtype=torch.int8, device=device, generator=generator
            ).cpu()
            part[f"{prefix}.{name}.SCB"] = torch.full((rows,), (3.0 / columns) ** 0.5)
        yield part


def _ones(size: int) -> torch.Tensor:
    return torch.ones(size, dtype=torch.bfloat16)


def linear_shapes(shape: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Return the shape (rows, columns) of each linear layer in a Llama layer."""
    hidden, inner = shape["hidden_size"], shape["intermediate_size"]
    keys = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    return {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
