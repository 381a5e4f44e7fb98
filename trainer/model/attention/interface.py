"""Attention over a packed batch, registered with transformers by name.

Each segment of the packed batch attends causally to itself and to all tokens of its prefix
segments, within the layer's window if it has one. Tokens remain packed in every linear layer; only
attention lays segments side by side in buckets (``trainer.model.attention.bucketed``), passes them
to one kernel (``trainer.model.attention.flex``) or, on a CPU, attends to each where it is
(``trainer.model.attention.spans``).

A prefix may also consist of keys and values per layer instead of tokens (prefix tuning, arXiv
2101.00190). They are already rotated and come after the keys and values of the tokens.

Shape letters: T tokens of a packed batch, U keys (T tokens and those of prefix tuning), P longest
prefix, A attention heads, D head size, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from trainer.model.attention.bucket_layout import Buckets, Scores, limit_queries, make_buckets
from trainer.model.attention.bucketed import attend_in_buckets
from trainer.model.attention.cpu_kernels import KernelCalls, attend_on_cpu
from trainer.model.attention.flex import FlexLayout, make_flex_layout
from trainer.model.attention.spans import LearnedSpans, Spans, learned_spans, make_spans
from trainer.packing.packed_batch import PackedBatch, Segment, map_tensors
from trainer.runtime.errors import BadInput

PACKED = "promptshard_packed"
#: Called in every layer with query [A, T, D], key [heads, U, D], parameters and index of the layer.
Observer = Callable[[Tensor, Tensor, Scores, int], None]


@dataclass(frozen=True)
class ReadQueries:
    """Queries of a layer whose other outputs are not read.

    Attributes:
        read_U: their positions.
        buckets: with only these queries.
    """

    read_U: Tensor
    buckets: Buckets


@dataclass(frozen=True)
class Layout:
    """Attention layout of one packed batch; computed once, used by every layer.

    Attributes:
        past: per layer, keys and values [P, 2, A, D] that follow those of the tokens; may be empty.
        spans: used in place of the buckets by layers that they suit, if the model is on a CPU; the
            layout is often made on a CPU for a model on a GPU.
        first: spans of the first layer, on a CPU; both ends compute less
            (``trainer.model.layers.end_layers``).
        last: queries of the last layer, unless it uses FlexAttention, or spans for more than half
            of its queries.
        last_layer: index of the last layer; None: all layers compute everything.
        flex: layout for FlexAttention; None: use the buckets.
        observer: measures attention, for ``promptshard inspect``.
    """

    buckets: Buckets
    spans: Spans | None = None
    first: LearnedSpans | None = None
    last: ReadQueries | None = None
    last_layer: int | None = None
    past: tuple[Tensor, ...] = ()
    flex: FlexLayout | None = None
    observer: Observer | None = None


def make_layout(
    segments: Sequence[Segment],
    device: torch.device,
    read_U: Tensor | None = None,
    num_learned: int | None = None,
) -> Layout:
    """Lay out the segments of a packed batch.

    Args:
        read_U: positions of the last layer's outputs that are read, ascending; None: all.
        num_learned: number of the first tokens, after which no embedding has a gradient; None: any.
    """
    buckets = make_buckets(segments)
    last = None
    if read_U is not None:
        read_U = read_U.cpu()
        last = ReadQueries(read_U, limit_queries(buckets, read_U))
    spans = make_spans(segments) if device.type == "cpu" else None
    first = None if spans is None or num_learned is None else learned_spans(spans, num_learned)
    layout = Layout(buckets, spans, first, last)
    return map_tensors(layout, lambda tensor: tensor.to(device, non_blocking=True))


def batch_layout(batch: PackedBatch, device: torch.device) -> Layout:
    """Lay out a packed batch whose first and last layers compute less."""
    return make_layout(batch.segments, device, batch.distinct_U, batch.num_learned)


def with_past(layout: Layout, past: Sequence[Tensor]) -> Layout:
    """Add keys and values of prompts to a layout.

    Args:
        past: [P, L, 2, A, D] of every prompt, in the order of their segments.
    """
    # Unbind once: slicing in every layer would allocate a gradient of the full tensor per layer.
    return replace(layout, past=torch.cat(list(past)).unbind(1)) if past else layout


def with_flex(layout: Layout, segments: Sequence[Segment]) -> Layout:
    """Add the layout for FlexAttention, which layers without sinks then use."""
    return replace(layout, flex=make_flex_layout(segments, layout.buckets.restore_T.device))


def attend(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, scores: Scores, layer: int
) -> Tensor:
    """Attention of one layer over a packed batch.

    Args:
        query: [1, A, T, D]; key and value may have fewer heads (grouped queries).

    Returns:
        [1, T, A, D].
    """
    if layout.past:
        past_2APD = layout.past[layer].to(key.dtype).permute(1, 2, 0, 3)
        key = torch.cat([key, past_2APD[None, 0]], dim=2)
        value = torch.cat([value, past_2APD[None, 1]], dim=2)
    if layout.observer is not None:
        layout.observer(query[0].detach(), key[0].detach(), scores, layer)
    if layout.flex is not None and scores.sinks_A is None:
        return layout.flex.attend(query, key, value, scores)
    # Squeezed: the backward of an index would copy into a tensor of zeros.
    query_TAD, key_UAD, value_UAD = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    spans = layout.spans if query.is_cpu and query.shape[-1] == value.shape[-1] else None
    if spans is not None and not spans.suits(scores):
        spans = None
    last = layout.last if layer == layout.last_layer else None
    # Spans are faster than buckets with most of the queries.
    if last is not None and (spans is None or 2 * len(last.read_U) <= len(query_TAD)):
        output_UAD = attend_in_buckets(
            query_TAD[last.read_U], key_UAD, value_UAD, last.buckets, scores
        )
        output_TAD = output_UAD.new_zeros(len(query_TAD), *output_UAD.shape[1:])
        return output_TAD.index_copy(0, last.read_U, output_UAD)[None]
    if spans is not None:
        calls: KernelCalls = spans
        if layout.first is not None and layout.last_layer is not None and layer == 0:
            calls = layout.first
        return attend_on_cpu(query_TAD, key_UAD, value_UAD, calls, scores)[None]
    return attend_in_buckets(query_TAD, key_UAD, value_UAD, layout.buckets, scores)[None]


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | Layout | None,
    *,
    scaling: float | None = None,
    layout: Layout | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer, with the shapes of ``attend``; called by transformers.

    Args:
        layout: passed through the model's keyword arguments, or in place of the mask.
    """
    layout = layout or attention_mask  # type: ignore[assignment]
    assert isinstance(layout, Layout)
    if (
        scaling is None
    ):  # GPT-2 of transformers 5.0, which leaves it to scaled_dot_product_attention
        scaling = query.shape[-1] ** -0.5
    chunk = getattr(module, "attention_chunk", None)
    scores = Scores(scaling, sliding_window, chunk, softcap, s_aux)
    layer: Any = module.layer_idx
    return attend(query, key, value, layout, scores, layer), None


def resolve_attention(setting: str, device: torch.device, packed: bool) -> bool:
    """Whether to use FlexAttention, by ``engine.attention``.

    Raises:
        BadInput: if FlexAttention has no backward on this device, or rows are not packed.
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


# transformers builds no mask for an attention without a registered mask function; the layout
# replaces the mask.
AttentionInterface.register(PACKED, packed_attention)
# torch 2.13 prefers cuDNN's attention on H100 and B200. It builds a plan for each shape, for 20 ms
# or more, and keeps it; few packed batches, and no two decode steps, have the same shapes.
torch.backends.cuda.enable_cudnn_sdp(False)
