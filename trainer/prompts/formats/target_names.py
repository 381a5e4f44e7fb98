"""Targets of ``promptshard export --to``. Imports no torch."""

from __future__ import annotations

from trainer.runtime.errors import BadInput, did_you_mean

TARGET_NAMES = ("peft", "vllm", "sglang", "tensorrt-llm", "llama-cpp", "npz")


def check_target_name(name: str) -> None:
    """Raise ``BadInput`` if no target has this name."""
    if name not in TARGET_NAMES:
        raise BadInput(
            f"--to: {name!r} is not a target{did_you_mean(name, TARGET_NAMES)}; known: "
            f"{', '.join(TARGET_NAMES)}"
        )
