"""Which quantization settings, of config.json and the run file, are possible. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trainer.config import Base
from trainer.runtime.errors import BadInput

if TYPE_CHECKING:
    from transformers import PretrainedConfig

#: Formats of compressed-tensors whose weights are one tensor of 8-bit values and their scales.
_COMPRESSED_FORMATS = (
    *(None, "dense", "float-quantized", "int-quantized", "naive-quantized", "pack-quantized"),
)
#: Methods whose weights are 8-bit values and scales.
SCALED_METHODS = ("fp8", "mxfp8", "fbgemm_fp8", "compressed-tensors")


def check_table_storage(settings: Base, *, tied: bool) -> None:
    """Raise BadInput if embeddings and head cannot be stored as the run file sets.

    Args:
        tied: the head of the model is its embedding table.
    """
    if tied and settings.embeddings != settings.head:
        raise BadInput(
            f"base.head: {settings.head}, but base.embeddings: {settings.embeddings}, and this "
            "model's head is its embedding table; give both the same value"
        )
    if "int8" in (settings.embeddings, settings.head) and settings.quantization != "int8":
        raise BadInput(
            f"base.quantization: {settings.quantization}, but base.embeddings or base.head is "
            "int8; use quantization: int8"
        )


def accept_quantization(config: PretrainedConfig, name: str) -> dict[str, Any] | None:
    """Remove the quantization settings from a config and return them; None if there are none.

    Raises:
        BadInput: if the weights are stored in a format that cannot be read; with the remedy.
    """
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    method: dict[str, Any] = settings if isinstance(settings, dict) else settings.to_dict()
    if problem := quantization_problem(method, name):
        raise BadInput(problem)
    del config.quantization_config
    return method


def quantization_problem(method: Mapping[str, Any], name: str) -> str | None:
    """Describe why weights with these settings cannot be read, with the remedy; None if they can.

    Args:
        method: ``quantization_config`` of config.json.
    """
    kind = method.get("quant_method", "an unknown format")
    reason = ""
    if kind == "compressed-tensors":
        reason = _compressed_problem(method)
    elif kind == "bitsandbytes":
        reason = "" if method.get("load_in_8bit") else "4 bits"
    elif kind not in (*SCALED_METHODS, "mxfp4"):
        reason = "cannot be read"
    return _refusal(str(kind), reason, name) if reason else None


def _compressed_problem(method: Mapping[str, Any]) -> str:
    """What cannot be read in compressed-tensors' settings; empty if all can."""
    groups = method.get("config_groups")
    groups = list(groups.values()) if isinstance(groups, dict) else []
    if not groups or not all(isinstance(group, dict) for group in groups):
        return "without config_groups"
    sparsity = method.get("sparsity_config")
    sparse = sparsity.get("format") if isinstance(sparsity, dict) else None
    if sparse not in (None, "dense"):
        return f"sparse: {sparse}"
    for group in groups:
        weights = group.get("weights")
        bits = weights.get("num_bits") if isinstance(weights, dict) else 8
        if bits != 8:
            return f"{bits} bits"
        layout = group.get("format") or method.get("format")
        if layout not in _COMPRESSED_FORMATS:
            return f"format {layout}"
    return ""


def _refusal(kind: str, reason: str, name: str) -> str:
    load = f"AutoModelForCausalLM.from_pretrained({name!r}"
    # In the original format, transformers may write tensor names that it cannot load.
    save = (
        "save_pretrained(NEW_FOLDER, save_original_format=False), AutoTokenizer.from_pretrained("
        f"{name!r}).save_pretrained(NEW_FOLDER)"
    )
    remedy = "use a release of the model in 16 bits or FP8"
    if kind == "compressed-tensors":
        dequantized = "quantization_config=CompressedTensorsConfig(dequantize=True)"
        remedy += (
            ", or convert it to 16 bits once with transformers (requires the package "
            f"compressed-tensors): {load}, {dequantized}).{save}"
        )
    elif kind == "bitsandbytes":
        remedy += f", or convert it to 16 bits once with transformers: {load}).dequantize().{save}"
    stored = kind if reason == "cannot be read" else f"{kind} ({reason})"
    return f"base.model: the weights of {name!r} are stored in {stored}, not supported; {remedy}"
