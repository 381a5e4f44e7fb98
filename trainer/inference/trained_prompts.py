"""Read the adapters of trained prompts and check that they fit the base."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from trainer.model.checkpoint_files import BaseFiles
from trainer.model.families import check_prefix_tuning, embedding_size, layer_sizes
from trainer.prompts.peft_adapter import load_peft
from trainer.prompts.soft_prompt import PrefixKeyValues, SoftPrompt, VirtualTokens
from trainer.runtime.errors import BadInput


def load_prompts(
    folders: Sequence[Path], files: BaseFiles, device: torch.device
) -> list[SoftPrompt]:
    """Read adapters with virtual tokens or keys and values, in fp32 on the device.

    Raises:
        BadInput: one is damaged, or was trained for another base.
    """
    prompts = [load_peft(folder).to(device, torch.float32) for folder in folders]
    width, sizes = embedding_size(files.config), layer_sizes(files.config)
    head_size = sizes.query_width // sizes.heads
    of_base = (sizes.layers, sizes.key_width // head_size, head_size)
    problems = []
    for folder, prompt in zip(folders, prompts, strict=True):
        if isinstance(prompt, PrefixKeyValues):
            check_prefix_tuning(files.config, files.name)
            of_prompt = (prompt.tensor.shape[1], *prompt.tensor.shape[3:])
            if of_prompt != of_base:
                layers, heads, size = of_prompt
                problems.append(
                    f"{folder}: its keys and values are of {layers} layers, {heads} heads of size "
                    f"{size}, and the base has {of_base[0]} layers, {of_base[1]} heads of size "
                    f"{of_base[2]}; use the base that they were trained for"
                )
        elif isinstance(prompt, VirtualTokens) and prompt.tensor.shape[1] != width:
            problems.append(
                f"{folder}: its virtual tokens have width {prompt.tensor.shape[1]}, and the base "
                f"has {width}; use the base that they were trained for"
            )
    if problems:
        raise BadInput(problems)
    return prompts
