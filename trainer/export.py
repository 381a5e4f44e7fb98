"""A trained prompt as a folder that PEFT loads.

Every method is exported as folded virtual tokens, which PEFT calls PROMPT_TUNING: one tensor under
the key ``prompt_embeddings``. Written by hand, because ``save_pretrained`` needs the whole base.

Shape letters: P virtual tokens, H hidden size.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor

from trainer import atomic

CONFIG, WEIGHTS, CARD = "adapter_config.json", "adapter_model.safetensors", "README.md"


def save_peft(
    folder: Path,
    virtual_tokens_PH: Tensor,
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
        virtual_tokens_PH: folded; saved in fp32.
        base_model_name: folder or hub id that PEFT loads the base from.
        title: of the model card; default: the folder's name.
        description: a line for the model card: task, score.

    Raises:
        ValueError: if the virtual tokens are not finite.
    """
    if not virtual_tokens_PH.isfinite().all():
        raise ValueError(f"{folder}: the virtual tokens are not finite; there is nothing to export")
    prompt_PH = virtual_tokens_PH.detach().to("cpu", torch.float32).contiguous()
    num_virtual_tokens, hidden_size = prompt_PH.shape
    config = {
        "base_model_name_or_path": base_model_name,
        "inference_mode": True,
        "num_attention_heads": num_attention_heads,
        "num_layers": num_layers,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": num_virtual_tokens,
        "peft_type": "PROMPT_TUNING",
        "prompt_tuning_init": "RANDOM",
        "revision": revision,
        "task_type": "CAUSAL_LM",
        "token_dim": hidden_size,
    }
    folder.mkdir(parents=True, exist_ok=True)
    atomic.write(folder / WEIGHTS, to_bytes({"prompt_embeddings": prompt_PH}, {"format": "pt"}))
    atomic.write_json(folder / CONFIG, config)
    atomic.write(folder / CARD, _card(title or folder.name, config, description))


def _card(name: str, config: dict[str, Any], description: str) -> str:
    base, revision = config["base_model_name_or_path"], config["revision"]
    at = "" if revision is None else f", revision={revision!r}"
    # JSON strings are YAML strings: a path with a colon must not break the header.
    return f"""---
library_name: peft
base_model: {json.dumps(base)}
tags: [prompt-tuning, promptshard]
---

# {name}

{config["num_virtual_tokens"]} virtual tokens of width {config["token_dim"]} for `{base}`, trained
by promptshard; the base itself is unchanged. {description}

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({base!r}{at})
model = PeftModel.from_pretrained(base, "path/to/this/folder")
```
"""
