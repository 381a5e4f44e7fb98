"""What differs between model families. Nothing elsewhere asks for a model's name.

A family stands here when its weights load tensor by tensor and its attention takes the packed
stream; tests compare each one with plain transformers.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig

from trainer.errors import BadInput


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        sliding_window: the family may limit how far a token looks back.
    """

    sliding_window: bool = False


FAMILIES: dict[str, Family] = {
    "llama": Family(),
    "mistral": Family(sliding_window=True),
    "qwen2": Family(sliding_window=True),
    "qwen3": Family(sliding_window=True),
}


def family_of(config: PretrainedConfig, name: str) -> Family:
    """The table's row for a model.

    Raises:
        BadInput: if the family, or this variant of it, cannot be trained yet.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise BadInput(
            f"base.model: {name!r} is of family {config.model_type!r}, which is not supported yet; "
            f"supported: {', '.join(sorted(FAMILIES))}"
        )
    if family.sliding_window and "sliding_attention" in (
        getattr(config, "layer_types", None) or []
    ):
        raise BadInput(
            f"base.model: {name!r} uses sliding-window attention "
            f"(sliding_window={config.sliding_window}), which is not supported yet"
        )
    return family
