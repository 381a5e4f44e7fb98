"""Inputs that every layer reads by token id (Gemma 3n, Gemma 4 E2B and E4B).

A second embedding table has a row per token with one part for each layer. Virtual tokens have no
ids: they get the row of the padding token, as images do in transformers.

Shape letters: B rows, T tokens, L layers, I size of a layer's input.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from trainer.model.families import FAMILIES
from trainer.packing.packed_batch import PackedBatch
from trainer.prompts.peft_adapter import IdRules
from trainer.prompts.soft_prompt import SoftPrompt, VirtualTokens


def per_layer_table(model: PreTrainedModel) -> nn.Module | None:
    """Return the embedding table of the layers' inputs; None if the model has none."""
    table: nn.Module | None = getattr(model.base_model, "embed_tokens_per_layer", None)
    return table


def id_rules(config: PretrainedConfig) -> IdRules:
    """Return what a text model does with token ids, but not with embeddings."""
    setting = FAMILIES[config.model_type].scale_of_ids
    per_layer = getattr(config, "hidden_size_per_layer_input", None)
    padding = int(config.pad_token_id or 0)  # 0 is Gemma's own
    scale = float(getattr(config, setting)) if setting else 1.0
    return IdRules(scale, padding if per_layer else None)


def ids_with_padding(
    batch: PackedBatch, virtual_tokens: Sequence[SoftPrompt], padding: int
) -> Tensor:
    """Token ids [T] of a packed batch; at virtual tokens, the ids they embed, or ``padding``."""
    ids_T = batch.token_ids_T.clone()
    for k, positions in batch.prompts:
        prompt = virtual_tokens[k]
        embedded = prompt.token_ids if isinstance(prompt, VirtualTokens) else None
        place = slice(positions.start, positions.end)
        ids_T[place] = padding if embedded is None else ids_T.new_tensor(embedded)
    return ids_T


def look_up(model: PreTrainedModel, token_ids_BT: Tensor) -> dict[str, Tensor]:
    """Argument ``per_layer_inputs`` [B, T, L, I] of the model's forward; a collective.

    Models without such inputs get no argument.
    """
    table = per_layer_table(model)
    if table is None:
        return {}
    # Gemma 3n's table lacks the last ids of the vocabulary, which get the row of the first.
    ids_BT = torch.where(token_ids_BT < model.config.vocab_size_per_layer_input, token_ids_BT, 0)
    size = model.config.hidden_size_per_layer_input
    return {"per_layer_inputs": table(ids_BT).unflatten(-1, (-1, size))}
