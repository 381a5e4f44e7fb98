"""Read and write PEFT adapters.

Every encoder is exported as its output: virtual tokens as PEFT's PROMPT_TUNING, keys and values as
PREFIX_TUNING, with one tensor ``prompt_embeddings``. PEFT's own ``save_pretrained`` is not used
because it needs the complete base model.

Shape letters: P virtual tokens, L layers, A key heads, D head size.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from trainer.prompts.saved_prompts import SETTINGS, TENSOR, WEIGHTS
from trainer.prompts.soft_prompt import PrefixKeyValues, SoftPrompt, VirtualTokens
from trainer.runtime import atomic_io
from trainer.runtime.errors import BadInput
from trainer.runtime.json_file import read_json_object

CARD = "README.md"


def save_peft(
    folder: Path,
    prompt: SoftPrompt,
    base_model_name: str,
    revision: str | None = None,
    *,
    num_layers: int,
    num_attention_heads: int,
    title: str | None = None,
    description: str = "",
) -> None:
    """Write ``adapter_config.json``, ``adapter_model.safetensors`` and a model card.

    Args:
        prompt: the encoder's output; saved in fp32.
        base_model_name: absolute path of the base model's folder, or its hub id.
        title: of the model card; default: the folder's name.
        description: line of the model card with task and scores.

    Raises:
        ValueError: the prompt is not finite.
    """
    if not prompt.is_finite():
        raise ValueError(f"{folder}: the virtual tokens are not finite")
    values = prompt.tensor.detach().to("cpu", torch.float32).contiguous()
    method: dict[str, Any] = {"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "RANDOM"}
    token_dim = values.shape[1]
    if isinstance(prompt, PrefixKeyValues):
        # PEFT counts key heads, which are fewer than query heads with grouped-query attention.
        _, num_layers, _, num_attention_heads, head_size = values.shape
        token_dim = num_attention_heads * head_size
        method = {
            "peft_type": "PREFIX_TUNING",
            "prefix_projection": False,
            "encoder_hidden_size": token_dim,
        }
    config = {
        "base_model_name_or_path": base_model_name,
        "inference_mode": True,
        "num_attention_heads": num_attention_heads,
        "num_layers": num_layers,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": prompt.num_virtual_tokens,
        **method,
        "revision": revision,
        "task_type": "CAUSAL_LM",
        "token_dim": token_dim,
    }
    folder.mkdir(parents=True, exist_ok=True)
    weights = {TENSOR: values.flatten(1)}
    atomic_io.write(folder / WEIGHTS, to_bytes(weights, {"format": "pt"}))
    atomic_io.write_json(folder / SETTINGS, config)
    atomic_io.write(folder / CARD, _card(title or folder.name, config, description, folder))


def load_peft(folder: Path) -> SoftPrompt:
    """Read the prompt of an adapter of ``save_peft`` or PEFT; raises ``BadInput`` if damaged."""
    try:
        values: Tensor = load_file(folder / WEIGHTS)[TENSOR]
        config = read_json_object(folder / SETTINGS)
        if config["peft_type"] != "PREFIX_TUNING":
            return VirtualTokens(values)
        shape = (config["num_layers"], 2, config["num_attention_heads"], -1)
        return PrefixKeyValues(values.unflatten(1, shape))
    except BadInput:
        raise
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise BadInput(
            f"{folder}: is damaged ({type(error).__name__}: {error}); restore it, or train the "
            "prompt again"
        ) from None


def _card(name: str, config: dict[str, Any], description: str, folder: Path) -> str:
    base, revision = config["base_model_name_or_path"], config["revision"]
    at = "" if revision is None else f", revision={revision!r}"
    kind = config["peft_type"].replace("_", " ").lower()
    what = f"{config['num_virtual_tokens']} virtual tokens of width {config['token_dim']}"
    if kind == "prefix tuning":
        what += f" as keys and values in each of {config['num_layers']} layers"
    # JSON strings are YAML strings: a path with a colon must not break the header.
    return f"""---
library_name: peft
base_model: {json.dumps(base)}
tags: [{kind.replace(" ", "-")}, promptshard]
---

# {name}

{what} for `{base}`, trained
by promptshard; the base itself is unchanged. {description}

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({base!r}{at})
model = PeftModel.from_pretrained(base, {str(folder.resolve())!r})  # this folder
```
"""
