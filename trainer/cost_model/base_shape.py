"""Sizes of the base as ranks store it, from the headers of its weight files. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from trainer.config import Base
from trainer.distributed.placement import BaseSize
from trainer.runtime.errors import BadInput

#: Bytes per element of the types in safetensors headers.
ITEMSIZES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL"), 1),
}
#: Stored tensors that are not weights: scales of quantized weights, buffers.
_NO_WEIGHT = re.compile(
    r"(\.SCB|_SCB|\.weight_format|_scale|_scale_inv|\.scales|inv_freq|\.masked_bias|"
    r"\.(attn|attention|self_attention)\.bias|position_ids|e_score_correction_bias)$"
)
#: Parts of a multimodal container that are not text, and layers for multi-token prediction.
_NO_TEXT = re.compile(r"(^|\.)(vision|visual|audio|image|multi_modal|embed_vision|mtp)")
_TABLE = re.compile(
    r"(^|\.)(embed_tokens|wte|embed_in|word_embeddings|embeddings|tok_embeddings|lm_head|embed_out)"
    r"\.weight$"
)
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out)\.weight$")
_LAYER = re.compile(r"\.(\d+)\.")
#: Experts by name; those of Granite are named like other layers, but stacked in three dimensions.
_EXPERT = re.compile(r"\.experts?\b.*\.(\d+)\.|\.experts\.")
#: Layers that choose experts; transformers keeps them in floating point.
_ROUTER = re.compile(r"\.(gate|router|router\.(layer|classifier))\.weight$")
#: Linear layers of GPT-2, whose matrices are stored transposed.
_CONV1D = re.compile(r"\.(c_attn|c_proj|c_fc|q_attn)\.weight$")
#: The MLP's products, of which the last layer computes few positions.
_MLP = re.compile(r"\.(mlp|block_sparse_moe)\.")
#: Products of attention that the last layer computes at few positions, and those that have little
#: backward in the first one, as in ``trainer.model.layers.end_layers``.
_ONLY_READ = re.compile(r"\.self_attn\.(q_proj|o_proj)\b")
_READ_HIDDEN = re.compile(r"\.self_attn\.(q_proj|k_proj|v_proj|qkv_proj)\b")
#: The last product of a layer, which is not repeated when the layer is recomputed in backward.
_LAST = re.compile(r"\b(down_proj|w2|fc2|fc_out|dense_4h_to_h|mlp\.c_proj|output_linear)\b")


@dataclass(frozen=True)
class Header:
    """One tensor in the header of a safetensors file: its type there, such as BF16, and shape."""

    type: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Weight:
    """One parameter of the base.

    Attributes:
        elements: number of elements.
        itemsize: bytes per element as stored on ranks.
        rows: number of row scales; 0 if the parameter is not quantized.
        unit: elements that are never divided between ranks: a row of a table, else 1.
        used: share of the elements that multiply each token: 0 for vectors and tables, below 1 for
            experts.
        last: the product is not repeated when the layer is recomputed.
        mlp: one of the MLP's products.
        only_read, reads_hidden: products of attention that end layers limit.
        layer: index of its layer; None outside the layers.
    """

    elements: int
    itemsize: int
    rows: int = 0
    unit: int = 1
    used: float = 0.0
    last: bool = False
    mlp: bool = False
    only_read: bool = False
    reads_hidden: bool = False
    layer: int | None = None

    @property
    def num_bytes(self) -> int:
        return self.elements * self.itemsize

    def shard_bytes(self, ranks: int) -> int:
        """Bytes of one rank's shard, padded to whole units."""
        return -(-self.elements // (ranks * self.unit)) * self.unit * self.itemsize


@dataclass(frozen=True)
class BaseShape:
    """Sizes of a base.

    Attributes:
        weights: parameters inside and outside the layers, without the tables.
        embedding, head: the tables; the same object if tied.
        vocab_size: rows of the head.
        hidden: columns of the head.
    """

    weights: tuple[Weight, ...]
    embedding: Weight
    head: Weight
    vocab_size: int
    hidden: int

    @property
    def tables(self) -> tuple[Weight, ...]:
        return (self.embedding,) if self.head is self.embedding else (self.embedding, self.head)

    def resident_bytes(self, ranks: int) -> int:
        """Bytes that stay on each of the ranks that share a copy: shards and all row scales."""
        every = (*self.weights, *self.tables)
        return sum(weight.shard_bytes(ranks) + 4 * weight.rows for weight in every)

    @property
    def gathered_bytes(self) -> int:
        """Bytes of all parameters that ZeRO-3 gathers: everything but the tables."""
        return sum(weight.num_bytes for weight in self.weights)

    @property
    def size(self) -> BaseSize:
        """The sizes from which the shard group is chosen."""
        units = [*self._layers(), *([w] for w in self.weights if w.layer is None)]
        return BaseSize(
            total_bytes=sum(weight.num_bytes for weight in (*self.weights, *self.tables)),
            looked_up_bytes=0 if self.head is self.embedding else self.embedding.num_bytes,
            layer_bytes=max(sum(w.num_bytes for w in unit) for unit in [*units, [self.head]]),
            layer_elements=max(sum(w.elements for w in unit) for unit in units),
        )

    def _layers(self) -> list[list[Weight]]:
        layers: dict[int, list[Weight]] = {}
        for weight in self.weights:
            if weight.layer is not None:
                layers.setdefault(weight.layer, []).append(weight)
        return [layers[index] for index in sorted(layers)]

    def layer_bytes(self) -> list[int]:
        """Bytes of each layer, in order."""
        return [sum(weight.num_bytes for weight in layer) for layer in self._layers()]

    @property
    def multiplied(self) -> float:
        """Elements that multiply each token, without the head."""
        return sum(weight.used * weight.elements for weight in self.weights)

    @property
    def largest_quantized(self) -> float:
        """Elements of the largest int8 matrix that is multiplied at a time.

        Of experts, the share that a token uses: whether a tensor holds one or all of them is not
        known.
        """
        return max(
            (weight.used * weight.elements for weight in self.weights if weight.rows), default=0
        )

    @property
    def recomputed(self) -> float:
        """Elements that multiply each token again when layers are recomputed in backward."""
        own = (w for w in self.weights if w.layer is not None and not w.last)
        return sum(weight.used * weight.elements for weight in own)

    @property
    def last_mlp(self) -> tuple[float, float]:
        """``multiplied`` and ``recomputed`` of the last layer's MLP; 0 without one."""
        own = [weight for weight in self._layers()[-1] if weight.mlp]
        multiplied = sum(weight.used * weight.elements for weight in own)
        return multiplied, multiplied - sum(w.used * w.elements for w in own if w.last)

    @property
    def only_read(self) -> int:
        """Elements of the last layer's products of attention that compute only read positions."""
        return sum(weight.elements for weight in self._layers()[-1] if weight.only_read)

    @property
    def only_learned(self) -> int:
        """Elements of the first layer's products without a backward for text; 0 for one layer."""
        first, *others = self._layers()
        return sum(weight.elements for weight in first if weight.reads_hidden) if others else 0


def read_base_shape(
    headers: Mapping[str, Header],
    settings: Base,
    *,
    model_type: str,
    num_layers: int,
    itemsize: int,
    tied: bool,
    own_head: bool = False,
    experts: tuple[int, int] = (0, 0),
) -> BaseShape:
    """Derive the sizes of a base from the headers of its weight files.

    Args:
        itemsize: bytes per element of the compute type.
        tied: config.json ties the head to the embeddings.
        own_head: a head that is stored nevertheless is a different one.
        experts: number of experts, and how many of them a token uses, without shared ones.

    Raises:
        BadInput: the tables are missing.
    """
    name = settings.model
    reader = _Reader(settings, num_layers, itemsize, experts, model_type == "gpt2")
    text = {key: header for key, header in headers.items() if reader.is_text(key)}
    tables = {key: header for key, header in text.items() if _is_table(key, header)}
    heads = [key for key in tables if _HEAD.search(key)]
    words = [key for key in tables if key not in heads]
    if not words and tied:
        words = heads
    elif heads and own_head:
        tied = False
    if len(words) != 1 or not (tied or heads):
        raise BadInput(
            f"base.model: the headers of {name!r} do not name one table of embeddings and a head "
            f"(tables: {', '.join(sorted(tables)) or 'none'}); plan cannot compute its sizes"
        )
    embedding = reader.table(tables[words[0]], settings.embeddings)
    head_header = tables[words[0] if tied else heads[0]]
    head = embedding if tied else reader.table(head_header, settings.head)
    weights = tuple(reader.weight(key, header) for key, header in text.items() if key not in tables)
    return BaseShape(weights, embedding, head, head_header.shape[0], head_header.shape[1])


def _is_table(key: str, header: Header) -> bool:
    return len(header.shape) == 2 and _TABLE.search(key) is not None and not _LAYER.search(key)


@dataclass(frozen=True)
class _Reader:
    settings: Base
    num_layers: int
    itemsize: int
    experts: tuple[int, int]
    transposed: bool

    def is_text(self, key: str) -> bool:
        """Whether a stored tensor is a parameter of the text model."""
        if _NO_WEIGHT.search(key) or _NO_TEXT.search(key):
            return False
        layer = _layer_of(key)
        return layer is None or layer < self.num_layers

    def table(self, header: Header, storage: str) -> Weight:
        rows, columns = header.shape
        int8 = storage == "int8" or (header.type == "I8" and self.settings.quantization == "int8")
        size = 1 if int8 else min(ITEMSIZES.get(header.type, 4), self.itemsize)
        return Weight(rows * columns, size, rows if int8 else 0, unit=columns)

    def weight(self, key: str, header: Header) -> Weight:
        elements, layer = prod(header.shape), _layer_of(key)
        if not self._is_linear(key, header, layer):
            return Weight(elements, self.itemsize, layer=layer)
        int8 = self.settings.quantization == "int8"
        stored = 1 if int8 else min(ITEMSIZES.get(header.type, 4), self.itemsize)
        used, (count, chosen) = 1.0, self.experts
        if count and (len(header.shape) > 2 or _EXPERT.search(key)):
            used = chosen / count
        rows = elements // self._inputs(key, header) if int8 else 0
        return Weight(
            elements,
            stored,
            rows,
            used=used,
            last=_LAST.search(key) is not None,
            mlp=_MLP.search(key) is not None,
            only_read=_ONLY_READ.search(key) is not None,
            reads_hidden=_READ_HIDDEN.search(key) is not None,
            layer=layer,
        )

    def _is_linear(self, key: str, header: Header, layer: int | None) -> bool:
        if len(header.shape) < 2 or key.endswith("bias"):
            return False
        routes = self.experts[0] and _ROUTER.search(key)
        positions = layer is None and re.search(r"(wpe|embed_positions|position)", key)
        return not routes and not positions

    def _inputs(self, key: str, header: Header) -> int:
        """Input features of a linear layer; GPT-2 stores its matrices transposed."""
        turned = self.transposed and _CONV1D.search(key) and header.type not in ("I8", "U8")
        return header.shape[-2] if turned else header.shape[-1]


def _layer_of(key: str) -> int | None:
    match = _LAYER.search(key)
    return None if match is None else int(match[1])
