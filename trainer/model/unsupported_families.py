"""Families that users are likely to try and that are not supported. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: Reason by ``model_type``.
UNSUPPORTED: dict[str, str] = {
    **dict.fromkeys(
        ("t5", "bart", "mt5", "pegasus"),
        "an encoder-decoder does not take virtual tokens before its text",
    ),
    **dict.fromkeys(("bert", "distilbert", "roberta"), "it is not a causal language model"),
    "mamba": "it has not been compared with transformers; use Mamba 2",
    "rwkv": "it has not been compared with transformers",
}


def unsupported_family(config: Mapping[str, Any], name: str) -> str | None:
    """Describe why the model of a config.json is not supported; None if that is not known here.

    Args:
        config: content of config.json, of a text model or its multimodal container.
    """
    text = config.get("text_config")
    for section in (config, text if isinstance(text, dict) else {}):
        kind = section.get("model_type")
        reason = UNSUPPORTED.get(kind) if isinstance(kind, str) else None
        if reason:
            return (
                f"base.model: {name!r} is of family {kind!r}, which is not supported ({reason}); "
                "use a causal language model such as Llama, Qwen or Gemma"
            )
    return None
