"""The values of a run's prompts before training, for ``promptshard inspect``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes

from trainer.config import RunConfig
from trainer.prompts.soft_prompt import SoftPrompt, kind_of
from trainer.runtime import atomic_io

INITIAL_FILE = "initial_prompts.safetensors"


def save_initial(output_dir: Path, prompts: Mapping[str, SoftPrompt]) -> None:
    """Write the values of all prompts, by name; raises ``OSError`` if that fails."""
    tensors = {name: prompt.tensor.detach().cpu().contiguous() for name, prompt in prompts.items()}
    atomic_io.write(output_dir / INITIAL_FILE, to_bytes(tensors))


def load_initial(output_dir: Path, config: RunConfig) -> dict[str, SoftPrompt]:
    """Read the values that ``save_initial`` wrote; empty if the file is missing or damaged.

    Runs of earlier versions have no such file.
    """
    try:
        tensors = load_file(output_dir / INITIAL_FILE)
    except (OSError, SafetensorError):
        return {}
    return {
        prompt.name: kind_of(prompt.entry)(tensors[prompt.name])
        for prompt in config.prompts
        if prompt.name in tensors
    }
