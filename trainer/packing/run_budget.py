"""Token budget of a run, from its settings and the free memory of a rank. Imports no torch.

``promptshard plan`` and the ranks call the same function.
"""

from __future__ import annotations

from collections.abc import Sequence

from trainer.config import RunConfig
from trainer.config.encoders import PromptWidths
from trainer.packing.activation_memory import (
    CPU_TOKENS,
    LOGITS_BYTES,
    RAMP,
    USABLE_SHARE,
    BatchMemory,
    LayerSizes,
    TokenBudget,
    choose_budget,
    row_sizes,
)

#: Copies of a prompt's parameters: values, gradient, two states of the optimizer, the best ones.
PROMPT_COPIES = 5


def prompt_bytes(config: RunConfig, sizes: LayerSizes) -> int:
    """fp32 bytes of the prompts and their encoders, and of what training keeps beside them."""
    widths = PromptWidths(sizes.hidden, sizes.key_width, sizes.layers)
    # Prompts of a share train one module.
    trained = {(p.share is None, p.share or p.name): p for p in config.prompts}
    parameters = sum(p.entry.num_parameters(p, widths) for p in trained.values())
    return 4 * PROMPT_COPIES * parameters


def run_budget(
    config: RunConfig,
    sizes: LayerSizes,
    lengths: Sequence[int],
    *,
    vocab_size: int,
    world_size: int,
    itemsize: int,
    left_bytes: int,
    packed: bool,
    on_cpu: bool,
) -> tuple[BatchMemory, TokenBudget]:
    """Choose the maximum tokens of a packed batch; equal on all ranks, as the arguments are.

    Args:
        lengths: tokens of each training row, or of a sample; empty without training.
        itemsize: bytes per element of the compute type.
        left_bytes: free bytes of a rank's device after the base is loaded.
        packed: the family supports packed rows.
    """
    virtual = [prompt.num_virtual_tokens for prompt in config.prompts]
    # 5% more than the mean: rows are not split, so some ranks get more tokens than others.
    rows = 1.05 * config.training.tokens_per_step * len(virtual) / world_size
    needed = int(rows) + sum(virtual) + max(lengths, default=0)
    memory = BatchMemory(
        sizes,
        row_sizes(lengths, max(virtual), packed, copied=not on_cpu),
        itemsize,
        min(LOGITS_BYTES, 4 * vocab_size * needed),
    )
    if lengths:  # prompts are trained
        left_bytes = max(0, left_bytes - prompt_bytes(config, sizes))
    tokens = config.training.micro_batch_tokens
    checkpointing = config.engine.gradient_checkpointing
    budget = choose_budget(
        memory,
        int(USABLE_SHARE * left_bytes),
        needed,
        tokens=None if tokens == "auto" else tokens,
        checkpointing=None if checkpointing == "auto" else checkpointing,
        most=CPU_TOKENS if on_cpu else None,
        ramp=(1.0,) if on_cpu else RAMP,
    )
    return memory, budget
