"""Read and write PEFT adapters.

Every encoder is exported as its output: virtual tokens as PEFT's PROMPT_TUNING, keys and values as
PREFIX_TUNING, with one tensor ``prompt_embeddings``. PEFT's own ``save_pretrained`` is not used
because it needs the complete base model.

Shape letters: P virtual tokens, L layers, A key heads, D head size.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from trainer.prompts.saved_prompts import (
    KEYS_AND_VALUES,
    SEGMENT,
    SETTINGS,
    TENSOR,
    WEIGHTS,
    trained_rows,
)
from trainer.prompts.soft_prompt import PrefixKeyValues, SoftPrompt, VirtualTokens
from trainer.runtime import atomic_io
from trainer.runtime.errors import BadInput
from trainer.runtime.json_file import read_json_object

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CARD = "README.md"
#: Paragraphs of the model card about the place of the virtual tokens.
_WITH_TEXT = """
The virtual tokens include the text {before} before the trained ones and {after} after them (with
special tokens). Pass only the text that follows, tokenized with `add_special_tokens=False`.
"""
_INSIDE = """
The virtual tokens were trained inside the text, after tokens that differ between rows. PEFT puts
them before all text, which gives other results. Insert them into the input embeddings instead:

```python
prompt = model.get_prompt(batch_size=1)
words = base.get_input_embeddings()(input_ids){factor}  # [1, tokens]
embeds = torch.cat([words[:, :place], prompt, words[:, place:]], 1)  # place: tokens before
base.generate(inputs_embeds=embeds)
```
"""
#: Paragraphs about bases that do more with token ids than with embeddings.
_SCALED = """
This base multiplies the embeddings of token ids by {scale}, but not embeddings that it gets, as
from PEFT. Multiply them before:

```python
words = base.get_input_embeddings()(input_ids) * {scale}  # [1, tokens]
embeds = torch.cat([model.get_prompt(batch_size=1), words], 1)
base.generate(inputs_embeds=embeds)
```
"""
_PER_LAYER = """
The layers of this base read inputs by token id. Virtual tokens have those of the padding token
({padding}), which PEFT does not pass:

```python
ids = torch.cat([{ids}], 1)
inputs = base.base_model.get_per_layer_inputs(ids)
logits = {call}, per_layer_inputs=inputs).logits
```
"""


@dataclass(frozen=True)
class FixedText:
    """Text around the virtual tokens that is the same in all rows, as PEFT stores it.

    Attributes:
        ids: token ids of the text.
        at: number of these tokens before the virtual tokens.
        embeddings: [n, H], of the base; None: keys and values of the text are part of the prompt.
        text: the decoded text before and after the virtual tokens, for the model card.
    """

    ids: tuple[int, ...]
    at: int
    embeddings: Tensor | None
    text: tuple[str, str]

    def around(self, prompt_PH: Tensor) -> Tensor:
        """Return the embeddings of the prompt's whole segment, [n + P, H]."""
        assert self.embeddings is not None, "keys and values include the text before them"
        fixed_nH = self.embeddings.to(prompt_PH)
        return torch.cat([fixed_nH[: self.at], prompt_PH, fixed_nH[self.at :]])


def read_fixed_text(folder: Path, tokenizer: PreTrainedTokenizerBase) -> FixedText | None:
    """Read the text around the virtual tokens of an adapter of ``save_peft``; None without one.

    Raises:
        BadInput: the adapter is damaged.
    """
    if not (folder / SEGMENT).is_file():
        return None
    try:
        values: Tensor = load_file(folder / WEIGHTS)[TENSOR]
        trained, segment = trained_rows(folder, len(values)), read_json_object(folder / SEGMENT)
        parts = segment["before"], segment["after"]
        prefix = read_json_object(folder / SETTINGS)["peft_type"] in KEYS_AND_VALUES
        around = values[: trained.start], values[trained.stop :]
        embeddings = None if prefix else torch.cat(around)
        before, after = (str(tokenizer.decode(list(part))) for part in parts)
        ids = tuple(int(i) for part in parts for i in part)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{folder}: is damaged ({type(error).__name__}: {error})") from None
    return FixedText(ids, len(parts[0]), embeddings, (before, after))


@dataclass(frozen=True)
class IdRules:
    """Rules that a base applies to token ids, but not to embeddings; for the model card.

    Attributes:
        scale: factor of their embeddings.
        padding: id whose inputs per layer virtual tokens get; None without such inputs.
    """

    scale: float = 1.0
    padding: int | None = None

    def card(self, prompt: SoftPrompt, fixed_text: FixedText | None, inside: bool) -> str:
        """Return the card's paragraphs about the use of virtual tokens."""
        use = "" if self.scale == 1.0 or inside else _SCALED.format(scale=self.scale)
        if inside:
            use = _INSIDE.format(factor="" if self.scale == 1.0 else f" * {self.scale}")
        if self.padding is not None:
            ids = f"[{self.padding}] * {prompt.num_virtual_tokens}"
            if fixed_text is not None:
                around = fixed_text.ids[: fixed_text.at], fixed_text.ids[fixed_text.at :]
                ids = f"{list(around[0])} + {ids} + {list(around[1])}"
            parts, call = f"torch.tensor([{ids}]), input_ids", "model(input_ids=input_ids"
            if inside:
                parts = f"input_ids[:, :place], torch.tensor([{ids}]), input_ids[:, place:]"
                call = "base(inputs_embeds=embeds"
            use += _PER_LAYER.format(padding=self.padding, ids=parts, call=call)
        return use


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
    fixed_text: FixedText | None = None,
    inside: bool = False,
    rules: IdRules | None = None,
) -> str:
    """Write ``adapter_config.json``, ``adapter_model.safetensors`` and a model card.

    PEFT puts an adapter before the complete text. Text that comes before the virtual tokens, or
    that all rows have after them, is therefore exported as further virtual tokens; the rows then
    begin after it. ``segment.json`` records which are trained. If the text before the virtual
    tokens differs between rows, the adapter has the virtual tokens only, and the model card
    describes how to insert them.

    Args:
        prompt: the encoder's output; saved in fp32.
        base_model_name: absolute path of the base model's folder, or its hub id.
        title: of the model card; default: the folder's name.
        description: line of the model card with task and scores.
        fixed_text: of the prompt's segment. Keys and values include those of the text before them.
        inside: the text before the virtual tokens differs between rows.
        rules: of the base; by default, it computes token ids only from their embeddings.

    Returns:
        The section of the model card about the use in PEFT.

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
    elif fixed_text is not None:
        values = fixed_text.around(values)
    config = {
        "base_model_name_or_path": base_model_name,
        "inference_mode": True,
        "num_attention_heads": num_attention_heads,
        "num_layers": num_layers,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": len(values),
        **method,
        "revision": revision,
        "task_type": "CAUSAL_LM",
        "token_dim": token_dim,
    }
    folder.mkdir(parents=True, exist_ok=True)
    weights = {TENSOR: values.flatten(1)}
    atomic_io.write(folder / WEIGHTS, to_bytes(weights, {"format": "pt"}))
    atomic_io.write_json(folder / SETTINGS, config)
    if fixed_text is None:
        (folder / SEGMENT).unlink(missing_ok=True)
    else:
        ids, at, trained = list(fixed_text.ids), fixed_text.at, prompt.num_virtual_tokens
        if not prompt.in_packed_batch:
            trained -= at
        segment = {"before": ids[:at], "num_virtual_tokens": trained, "after": ids[at:]}
        atomic_io.write_json(folder / SEGMENT, segment)
    use = (rules or IdRules()).card(prompt, fixed_text, inside)
    if fixed_text is not None:
        before, after = map(json.dumps, fixed_text.text)
        use = _WITH_TEXT.format(before=before, after=after) + use
    usage = _usage(config, folder, use)
    atomic_io.write(folder / CARD, _card(title or folder.name, config, description, usage))
    return usage


def load_peft(folder: Path) -> SoftPrompt:
    """Read the prompt of an adapter of ``save_peft`` or PEFT; raises ``BadInput`` if damaged."""
    try:
        values: Tensor = load_file(folder / WEIGHTS)[TENSOR]
        config = read_json_object(folder / SETTINGS)
        if config["peft_type"] not in KEYS_AND_VALUES:
            return VirtualTokens(values[trained_rows(folder, len(values))])
        shape = (config["num_layers"], 2, config["num_attention_heads"], -1)
        return PrefixKeyValues(values.unflatten(1, shape))
    except BadInput:
        raise
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise BadInput(
            f"{folder}: is damaged ({type(error).__name__}: {error}); restore it, or train the "
            "prompt again"
        ) from None


def _usage(config: dict[str, Any], folder: Path, use: str) -> str:
    """Return the lines that load the adapter in PEFT, and the paragraphs ``use``."""
    base, revision = config["base_model_name_or_path"], config["revision"]
    at = "" if revision is None else f", revision={revision!r}"
    source = f"{base!r}{at}"
    if base.endswith(".gguf"):  # transformers takes the file's folder and name
        source = f"{str(Path(base).parent)!r}, gguf_file={Path(base).name!r}"
    return f"""
```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained({source})
model = PeftModel.from_pretrained(base, {str(folder.resolve())!r})  # this folder
```
{use}"""


def _card(name: str, config: dict[str, Any], description: str, usage: str) -> str:
    base = config["base_model_name_or_path"]
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
{usage}"""
