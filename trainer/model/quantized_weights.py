"""Accept or refuse the quantization of a checkpoint, and combine its values with their scales.

Accepted: FP8 and int8 with scales per tensor, row or block, also packed in int32, MXFP4, and
bitsandbytes' int8.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from trainer.model.encodings import (
    EXPONENT_TYPES,
    SCALE_TYPES,
    VALUE_TYPES,
    Mxfp4Blocks,
    PackedInt8,
    PackedZeroPoints,
    RowScales,
    ScaledBlocks,
    ScaleGrid,
)
from trainer.model.quantization_config import SCALED_METHODS
from trainer.model.safetensors_reader import (
    Encoding,
    SafetensorsReader,
    StoredTensor,
    scales_name,
)
from trainer.runtime.errors import BadInput

#: Default block of transformers' FineGrainedFP8Config.
_FP8_BLOCK = (128, 128)
#: Tensors that describe activations, the key-value cache or packing: not part of a weight.
_UNUSED = re.compile(
    r"\.((input|output|activation|k|v|q)_(scale|zero_point)|qscale_act|weight_shape)$"
)


def combine_tensors(
    tensors: Mapping[str, StoredTensor], method: Mapping[str, Any] | None
) -> dict[str, StoredTensor]:
    """Combine quantized values and their scales to one tensor each, named like the weight.

    Symmetric int8 values with one scale per row keep their bytes; their scales get the name and
    the meaning of bitsandbytes' row scales.

    Raises:
        BadInput: if scales are missing or do not match their values.
    """
    kind = None if method is None else method.get("quant_method")
    if kind == "mxfp4":
        return _combine_mxfp4(tensors)
    if kind not in SCALED_METHODS:
        return dict(tensors)
    assert method is not None
    tensors = _unpack(tensors, symmetric=_is_symmetric(method))
    combined = {name: stored for name, stored in tensors.items() if not _UNUSED.search(name)}
    blocks, problems = list(_declared_blocks(method)), []
    for name, stored in tensors.items():
        is_weight = stored.type in VALUE_TYPES and len(stored.shape) > 1 and name in combined
        if not is_weight or name.endswith("_zero_point"):
            continue
        try:
            _combine(combined, name, blocks, symmetric=_is_symmetric(method))
        except BadInput as error:
            problems += error.problems
    if problems:
        raise BadInput(problems[:10])
    return combined


def _unpack(tensors: Mapping[str, StoredTensor], *, symmetric: bool) -> dict[str, StoredTensor]:
    """Replace the packed int32 tensors of compressed-tensors by the int8 values in them."""
    unpacked = dict(tensors)
    for name in tensors:
        module = name.removesuffix(".weight_packed")
        if module == name:
            continue
        words = unpacked.pop(name)
        shape = _packed_shape(tensors.get(f"{module}.weight_shape"), words)
        if f"{module}.weight_g_idx" in tensors:
            raise BadInput(
                f"{words.path}: {module}.weight_g_idx: columns in another order (actorder) are not "
                "supported; use a release of the model in 16 bits or FP8"
            )
        values = replace(words, type="I8", shape=shape, encoding=PackedInt8(words, shape[-1]))
        unpacked[f"{module}.weight"] = values
        zeros, scales = (tensors.get(f"{module}.weight_{x}") for x in ("zero_point", "scale"))
        if zeros and scales and zeros.type == "I32" and len(shape) == 2 and not symmetric:
            unpacked[f"{module}.weight_zero_point"] = replace(
                zeros, type="I8", shape=scales.shape, encoding=PackedZeroPoints(zeros)
            )
    return unpacked


def _packed_shape(stored: StoredTensor | None, words: StoredTensor) -> tuple[int, ...]:
    """Read the shape of a packed weight from its file."""
    shape: list[int] = []
    if stored is not None and stored.type in ("I32", "I64"):
        with SafetensorsReader({}) as reader:
            raw = reader.read_stored(stored, 0, stored.num_bytes)
        shape = raw.view(torch.int64 if stored.type == "I64" else torch.int32).tolist()
    packed = (*shape[:-1], *(-(-columns // 4) for columns in shape[-1:]))
    if len(shape) < 2 or words.type != "I32" or words.shape != packed:
        raise BadInput(
            f"{words.path}: a weight packed as {words.type} {list(words.shape)} does not have 8 "
            f"bits and shape {shape}; copy or download the model again"
        )
    return tuple(shape)


def _combine(
    tensors: dict[str, StoredTensor],
    name: str,
    blocks: Sequence[tuple[int, int]],
    *,
    symmetric: bool,
) -> None:
    """Replace one weight, its scales and zero points by their combination."""
    stored = tensors[name]
    module = name.removesuffix(".weight")
    names = [f"{name}_scale_inv", f"{name}_scale"]
    if module != name:
        names += [f"{module}.scale", f"{module}.qscale_weight"]
    present = [scale for scale in names if scale in tensors]
    if not present:
        raise BadInput(
            f"{stored.path}: {name!r} is stored as {stored.type}, but its scales {names[0]!r} are "
            "missing; copy or download the model again"
        )
    scales = _grid(tensors.pop(present[0]), name, stored, blocks)
    zero_name = f"{name}_zero_point"
    zero = tensors.pop(zero_name, None)
    zeros = None if zero is None or symmetric else _grid(zero, zero_name, stored, blocks)
    by_row = scales.shape[1] == 1 and scales.shape[0] in (1, stored.shape[-2])
    if stored.type == "I8" and zeros is None and by_row:
        row_scales = RowScales(scales, stored.shape[-2])
        tensors[scales_name(name)] = _encoded(scales.stored, stored.shape[:-1], row_scales)
    else:
        tensors[name] = _encoded(stored, stored.shape, ScaledBlocks(stored, scales, zeros))


def _grid(
    scales: StoredTensor, name: str, stored: StoredTensor, blocks: Sequence[tuple[int, int]]
) -> ScaleGrid:
    grid = None
    if scales.type in (*SCALE_TYPES, *EXPONENT_TYPES, "I8"):
        grid = ScaleGrid.fit(scales, stored.shape, blocks)
    if grid is None:
        raise BadInput(
            f"{scales.path}: the scales of {name!r} are {scales.type} {list(scales.shape)}, which "
            f"do not divide its shape {list(stored.shape)} into blocks; copy or download the "
            "model again"
        )
    return grid


def _encoded(stored: StoredTensor, shape: tuple[int, ...], encoding: Encoding) -> StoredTensor:
    return replace(stored, shape=shape, encoding=encoding)


def _declared_blocks(method: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """Rows and columns of the blocks that config.json declares."""
    weights = [method, *_group_weights(method)]
    for settings in weights:
        for key in ("weight_block_size", "block_structure"):
            block = settings.get(key)
            if (
                isinstance(block, list | tuple)
                and len(block) == 2
                and all(isinstance(size, int) and size > 0 for size in block)
            ):
                yield block[0], block[1]
    if method.get("quant_method") == "fp8":
        yield _FP8_BLOCK


def _group_weights(method: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = method.get("config_groups")
    if not isinstance(groups, dict):
        return []
    weights = (group.get("weights") for group in groups.values() if isinstance(group, dict))
    return [each for each in weights if isinstance(each, dict)]


def _is_symmetric(method: Mapping[str, Any]) -> bool:
    return all(weights.get("symmetric", True) for weights in _group_weights(method))


def _combine_mxfp4(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    combined = dict(tensors)
    for name, stored in tensors.items():
        weight = name.removesuffix("_blocks")
        if weight == name or stored.type != "U8":
            continue
        exponents = combined.pop(f"{weight}_scales", None)
        shape = stored.shape
        if exponents is None or exponents.type != "U8" or exponents.shape != shape[:-1]:
            raise BadInput(
                f"{stored.path}: {name!r} has no exponents {weight}_scales of shape "
                f"{list(shape[:-1])}; copy or download the model again"
            )
        del combined[name]
        values = (*shape[:-2], shape[-2] * shape[-1] * 2)
        combined[weight] = _encoded(stored, values, Mxfp4Blocks(stored, exponents))
    return combined
