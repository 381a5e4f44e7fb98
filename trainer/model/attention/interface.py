"""Attention over a packed batch, plugged into transformers by name.

Each segment of the packed batch attends causally to itself and to all tokens of its prefix
segments, within the layer's window if it has one. The tokens stay packed in every linear layer;
only here are segments laid side by side in buckets (``trainer.model.attention.bucketed``) or handed
to one kernel (``trainer.model.attention.flex``).

A prefix may also be keys and values that come with the layout instead of from tokens (prefix
tuning, arXiv 2101.00190). They are used as they are, behind any rotation, as those in a cache are;
here they stand behind the packed batch's own.

Shape letters: T tokens of a packed batch, U tokens and keys that come with the layout, P longest
prefix, A attention heads, D head size, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from trainer.model.attention.bucketed import Buckets, Scores, make_buckets
from trainer.model.attention.flex import FlexLayout, make_flex_layout
from trainer.packing.packed_batch import Segment
from trainer.runtime.errors import BadInput

PACKED = "promptshard_packed"


@dataclass(frozen=True)
class Layout:
    """How the segments of one packed batch attend; made once, used by every layer.

    Attributes:
        past: per layer, keys and values [P, 2, A, D] that stand behind those of the tokens; empty
            if there are none.
        flex: the same for one kernel instead of buckets; None where these are wanted.
    """

    buckets: Buckets
    past: tuple[Tensor, ...] = ()
    flex: FlexLayout | None = None


def make_layout(segments: Sequence[Segment], device: torch.device) -> Layout:
    return Layout(make_buckets(segments, device))


def with_past(layout: Layout, past: Sequence[Tensor]) -> Layout:
    """The layout with keys and values behind those of the tokens.

    Args:
        past: [P, L, 2, A, D] of prompts, in the order of their segments.
    """
    # One slice per layer, made here once: a slice taken in every layer would send back a gradient
    # of the whole from each of them.
    return replace(layout, past=torch.cat(list(past)).unbind(1)) if past else layout


def with_flex(layout: Layout, segments: Sequence[Segment]) -> Layout:
    """The layout for one kernel, except where a layer has sinks."""
    return replace(layout, flex=make_flex_layout(segments, layout.buckets.restore_T.device))


def attend(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scores: Scores, layer: int
) -> Tensor:
    """Attention of one layer over a packed batch.

    Args:
        query: [1, A, T, D]; key and value may have fewer heads (grouped queries).
        layer: its number, from 0.

    Returns:
        [1, T, A, D].
    """
    if layout.past:
        past_2APD = layout.past[layer].to(key.dtype).permute(1, 2, 0, 3)
        key = torch.cat([key, past_2APD[None, 0]], dim=2)
        value = torch.cat([value, past_2APD[None, 1]], dim=2)
    if layout.flex is not None and scores.sinks_A is None:
        return layout.flex.attend(query, key, value, scores)
    query_TAD, key_UAD, value_UAD = (x[0].transpose(0, 1) for x in (query, key, value))
    return layout.buckets.attend(query_TAD, key_UAD, value_UAD, scores)[None]


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | Layout | None,
    *,
    scaling: float,
    layout: Layout | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer; called by transformers.

    Args:
        query: [1, A, T, D]; key and value may have fewer heads (grouped queries).
        layout: handed down through the model's keyword arguments, or in place of the mask.

    Returns:
        [1, T, A, D], and no attention weights.
    """
    layout = layout or attention_mask  # type: ignore[assignment]
    assert isinstance(layout, Layout)
    scores = Scores(scaling, sliding_window, softcap, s_aux)
    layer: Any = module.layer_idx
    return attend(query, key, value, layout, scores, layer), None


def resolve_attention(setting: str, device: torch.device, packed: bool) -> bool:
    """Whether ``engine.attention`` asks for FlexAttention.

    Raises:
        BadInput: where it cannot run backward, or no rows are packed.
    """
    if setting == "flex" and not packed:
        raise BadInput(
            "engine.attention: flex is for packed rows, but those of this base are padded; use auto"
        )
    if setting == "flex" and device.type != "cuda":
        raise BadInput(
            f"engine.attention: flex, but this machine computes on {device.type}, where "
            "FlexAttention has no backward; use sdpa or auto"
        )
    return setting == "flex"


# Of an attention that is in no list of masks transformers takes none to be needed: the layout says
# who sees whom.
AttentionInterface.register(PACKED, packed_attention)
