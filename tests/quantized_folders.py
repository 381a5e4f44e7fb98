"""Write a model folder in a quantized format, and a second one with the dequantized weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.odd_folders import SINGLE, edit_config

#: Turns a weight [N, K] into stored tensors, by the suffix of their name, and its values in fp32.
Quantize = Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]


@dataclass(frozen=True)
class Format:
    """A quantized format: how weights are stored, and ``quantization_config`` of config.json."""

    quantize: Quantize
    method: dict[str, Any]


def _scaled(
    weight: Tensor, block: tuple[int, int], dtype: torch.dtype, largest: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Values, scales [rows / block, columns / block] and scales of every element."""
    n, k = weight.shape
    rows, columns = -(-n // block[0]), -(-k // block[1])
    padded = torch.zeros(rows * block[0], columns * block[1])
    padded[:n, :k] = weight
    blocks = padded.view(rows, block[0], columns, block[1])
    scales = blocks.abs().amax((1, 3)) / largest
    full = scales.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:n, :k]
    values = weight / full
    values = values.round() if dtype == torch.int8 else values
    return values.to(dtype), scales, full


def _blocks(
    suffix: str,
    block: tuple[int, int] | None,
    dtype: torch.dtype = torch.float8_e4m3fn,
    scale_dtype: torch.dtype = torch.float32,
    shape: tuple[int, ...] | None = None,
) -> Quantize:
    """Scaled values; ``block`` None: one scale for the weight; columns -1: all."""

    def quantize(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        n, k = weight.shape
        size = (
            (n, k)
            if block is None
            else tuple(s if s > 0 else d for s, d in zip(block, (n, k), strict=True))
        )
        largest = 127.0 if dtype == torch.int8 else 448.0
        values, scales, _ = _scaled(weight, size, dtype, largest)
        scales = scales.to(scale_dtype)
        full = scales.float().repeat_interleave(size[0], 0).repeat_interleave(size[1], 1)[:n, :k]
        stored = scales if shape is None else scales.reshape(shape)
        return {"": values, suffix: stored}, values.float() * full

    return quantize


def _with_activation_scale(quantize: Quantize, name: str) -> Quantize:
    def both(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        stored, values = quantize(weight)
        return stored | {name: torch.ones(())}, values

    return both


def _int8_groups(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Asymmetric int8: groups of 8 columns with a zero point."""
    n, k = weight.shape
    groups = weight.view(n, k // 8, 8)
    low, high = groups.amin(-1), groups.amax(-1)
    scales = (high - low) / 255
    zeros = (-128 - low / scales).round().clamp(-128, 127)
    values = (groups / scales[..., None] + zeros[..., None]).round().clamp(-128, 127)
    dequantized = (values - zeros[..., None]) * scales[..., None]
    stored = {
        "": values.to(torch.int8).view(n, k),
        "_scale": scales,
        "_zero_point": zeros.to(torch.int8),
    }
    return stored, dequantized.view(n, k)


def _mxfp8(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Blocks of 8 columns with an exponent in one byte."""
    n, k = weight.shape
    groups = weight.view(n, k // 8, 8)
    exponents = groups.abs().amax(-1).log2().ceil() - 8
    values = (groups / exponents.exp2()[..., None]).to(torch.float8_e4m3fn)
    stored = {"": values.view(n, k), "_scale_inv": (exponents + 127).to(torch.uint8)}
    return stored, (values.float() * exponents.exp2()[..., None]).view(n, k)


def _packed(quantize: Quantize) -> Quantize:
    """Four values in an int32 as compressed-tensors packs them; zero points by rows."""

    def pack(values: Tensor) -> Tensor:
        padded = torch.zeros(len(values), -(-values.shape[1] // 4) * 4, dtype=torch.uint8)
        padded[:, : values.shape[1]] = values.view(torch.uint8) ^ 128
        return padded.view(torch.int32)

    def both(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        stored, values = quantize(weight)
        plain = stored.pop("")
        stored |= {"_packed": pack(plain), "_shape": torch.tensor(weight.shape)}
        if "_zero_point" in stored:
            stored["_zero_point"] = pack(stored["_zero_point"].T).T.contiguous()
        return stored, values

    return both


def _compressed(
    kind: str, strategy: str, *, packed: bool = False, **weights: Any
) -> dict[str, Any]:
    settings = {"num_bits": 8, "type": kind, "strategy": strategy, "symmetric": True, **weights}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized" if packed else f"{kind}-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": settings}},
        "ignore": ["lm_head"],
    }


_FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}

#: Shapes of the families' cases are multiples of 16, so blocks of 32 rows do not divide all.
FORMATS: dict[str, Format] = {
    "fp8 per block": Format(
        _blocks("_scale_inv", (32, 16)), {**_FP8, "weight_block_size": [32, 16]}
    ),
    "fp8 per large block": Format(
        _blocks("_scale_inv", (128, 128)), {**_FP8, "weight_block_size": [128, 128]}
    ),
    "fp8 per tensor": Format(
        _with_activation_scale(_blocks("_scale_inv", None, shape=()), "|activation_scale"),
        {**_FP8, "activation_scheme": "static", "weight_block_size": None},
    ),
    "fp8 per row": Format(
        _with_activation_scale(
            _blocks("_scale", (1, -1), scale_dtype=torch.bfloat16), "|input_scale"
        ),
        _compressed("float", "channel"),
    ),
    "fp8 per row, fbgemm": Format(_blocks("_scale", (1, -1)), {"quant_method": "fbgemm_fp8"}),
    "fp8 per tensor, compressed": Format(
        _blocks("_scale", None, shape=(1,)), _compressed("float", "tensor")
    ),
    "mxfp8": Format(_mxfp8, {**_FP8, "quant_method": "mxfp8", "weight_block_size": [1, 8]}),
    "int8 per row": Format(_blocks("_scale", (1, -1), torch.int8), _compressed("int", "channel")),
    "int8 per tensor": Format(
        _blocks("_scale", None, torch.int8, shape=(1,)), _compressed("int", "tensor")
    ),
    "int8 per group": Format(_int8_groups, _compressed("int", "group", symmetric=False)),
    "packed int8 per row": Format(
        _packed(_blocks("_scale", (1, -1), torch.int8)), _compressed("int", "channel", packed=True)
    ),
    "packed int8 per group": Format(
        _packed(_blocks("_scale", (1, 8), torch.int8)),
        _compressed("int", "group", packed=True, group_size=8),
    ),
    "packed int8 per group, asymmetric": Format(
        _packed(_int8_groups),
        _compressed("int", "group", packed=True, group_size=8, symmetric=False),
    ),
}
#: Formats that transformers dequantizes here without another package.
READ_BY_TRANSFORMERS = ("fp8 per large block", "fp8 per tensor", "mxfp8")
#: Formats whose int8 values are loaded without being quantized again.
KEPT_INT8 = ("int8 per row", "int8 per tensor", "packed int8 per row")


def quantize_folder(
    folder: Path,
    form: Format,
    quantized: Path,
    dequantized: Path,
    names: tuple[str, ...] = ("proj",),
) -> None:
    """Quantize the matrices of a folder whose name contains one of ``names``."""
    shutil.copytree(folder, quantized)
    shutil.copytree(folder, dequantized)
    stored, values = {}, {}
    for name, tensor in load_file(folder / SINGLE).items():
        stored[name] = values[name] = tensor
        if tensor.dim() == 2 and any(part in name for part in names):
            del stored[name]
            parts, values[name] = form.quantize(tensor.float())
            for suffix, part in parts.items():
                module = name.removesuffix("weight")
                key = module + suffix[1:] if suffix.startswith("|") else name + suffix
                stored[key] = part.contiguous()
    save_file(stored, quantized / SINGLE, {"format": "pt"})
    save_file(
        {n: t.contiguous() for n, t in values.items()}, dequantized / SINGLE, {"format": "pt"}
    )
    edit_config(quantized, lambda config: config.update(quantization_config=form.method))


def write_mxfp4(folder: Path, quantized: Path) -> None:
    """Replace the experts of a gpt-oss folder by random MXFP4 blocks."""
    shutil.copytree(folder, quantized)
    tensors = load_file(folder / SINGLE)
    generator = torch.Generator().manual_seed(2)
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        shape = (experts, outputs, inputs // 32, 16)
        tensors[f"{name}_blocks"] = torch.randint(
            0, 256, shape, dtype=torch.uint8, generator=generator
        )
        tensors[f"{name}_scales"] = torch.randint(
            121, 125, shape[:-1], dtype=torch.uint8, generator=generator
        )
    save_file(tensors, quantized / SINGLE, {"format": "pt"})
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router"]
    kept += ["model.embed_tokens", "lm_head"]
    method = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    edit_config(quantized, lambda config: config.update(quantization_config=method))


def declare(folder: Path, **method: Any) -> None:
    """Write ``quantization_config`` into config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": method}))
