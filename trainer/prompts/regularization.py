"""Noise and dropout on a prompt during training, against overfitting.

Noise smooths the loss around the prompt and avoids sharp minima (Chen et al. 2023, arXiv
2305.02423, add a regularization term to the loss instead). Random numbers are drawn on the CPU from
seed and update only, so they are equal on all ranks, after a resume, and for any other prompts.

Shape letters: P virtual tokens, H hidden size; keys and values: [P, layers, 2, heads, head size].
"""

from __future__ import annotations

import hashlib

import torch

from trainer.prompts.soft_prompt import SoftPrompt


def perturbed(
    prompt: SoftPrompt, seed: int, update: int, *, noise: float = 0.0, dropout: float = 0.0
) -> SoftPrompt:
    """Add noise and dropout for one training step; differentiable.

    Args:
        update: number of updates before this one.
        noise: standard deviation, as a share of the root mean square of the prompt or, for keys
            and values, of the keys (or values) of the same layer.
        dropout: share of elements set to zero; the others are scaled by ``1 / (1 - dropout)``.
    """
    if not noise and not dropout:
        return prompt
    generator = torch.Generator().manual_seed(_mixed(seed, update))
    values = prompt.tensor
    if noise:
        rms = values.detach().square().mean(prompt.rms_dims, keepdim=True).sqrt()
        drawn = torch.randn(values.shape, generator=generator)
        values = values + noise * rms * drawn.to(values, non_blocking=True)
    if dropout:
        kept = (torch.rand(values.shape, generator=generator) >= dropout) / (1 - dropout)
        values = values * kept.to(values, non_blocking=True)
    return type(prompt)(values)


def _mixed(seed: int, update: int) -> int:
    digest = hashlib.sha256(f"perturbation {seed}/{update}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
