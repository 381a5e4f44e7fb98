"""What an arm costs: tokens and FLOPs per query, and those of training its prompt.

A query is answered alone: nothing that the base reads is shared with other queries. The choices of
a row share its text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trainer.commands.evaluate.arm import Arm
from trainer.model.families import layer_sizes
from trainer.model.layers.linear import FrozenLinear
from trainer.model.layers.lm_head import FrozenHead
from trainer.model.layers.moe import FrozenExperts
from trainer.packing.packed_row import PackedRow
from trainer.reporting.summary import RunSummary

#: Forward passes that a training step costs per token: forward and input-gradient; a frozen base
#: has no weight gradient. Recomputed layers add one.
TRAINED_PASSES = 2


@dataclass(frozen=True)
class BaseCost:
    """Sizes that determine FLOPs.

    Attributes:
        weights: weights of linear layers that multiply every token; of experts, the chosen ones.
        head: weights of the head.
        attention_width: layers times width of all queries.
    """

    weights: int
    head: int
    attention_width: int
    vocab_size: int

    @classmethod
    def of(cls, model: Any) -> BaseCost:
        """Read the sizes from a model, on ``meta`` or loaded."""
        modules = list(model.modules())
        linear = sum(_size(m) for m in modules if isinstance(m, FrozenLinear))
        head = sum(_size(m) for m in modules if isinstance(m, FrozenHead))
        sizes = layer_sizes(model.config)
        experts = 0
        for module in modules:
            if isinstance(module, FrozenExperts):
                stored = sum(p.numel() for p in module.parameters() if p.dim() == 3)
                experts += stored * max(1, sizes.experts_per_token) // module.num_experts
        return cls(
            linear - head + experts, head, sizes.layers * sizes.query_width, model.config.vocab_size
        )

    def flops(self, tokens: float, predicted: float) -> float:
        """Multiplications and additions for a query.

        Args:
            tokens: read, each of which attends to those before it.
            predicted: positions of which the head computes logits.
        """
        products = 2 * self.weights * tokens + 2 * self.head * predicted
        return products + 2 * self.attention_width * tokens**2


def query_cost(arm: Arm, base: BaseCost) -> tuple[float, float]:
    """Return mean tokens read per query, and mean FLOPs."""
    tokens = flops = 0.0
    for row in arm.rows.candidates:
        if arm.neighbors is not None:
            read = row[0].last_target[0]
            compared = 2 * len(arm.neighbors.inputs) * base.vocab_size
            tokens, flops = tokens + read, flops + base.flops(read, 1) + compared
            continue
        packed = PackedRow(row[0], arm.prompt, 0, candidates=tuple(row))
        read = packed.num_tokens + packed.num_leading + arm.virtual_tokens
        tokens += read
        flops += base.flops(read, sum(example.num_labels for example in row))
    rows = len(arm.rows.candidates)
    searched = base.flops(arm.query_tokens, 0)
    return tokens / rows + arm.query_tokens, flops / rows + searched


def training_flops(summary: RunSummary | None, base: BaseCost) -> float | None:
    """FLOPs of training one prompt: an equal share of those of the run; None if unknown."""
    tokens = summary.throughput.useful_tokens if summary else None
    if summary is None or not tokens or not summary.prompts:
        return None
    passes = TRAINED_PASSES + bool(summary.memory.gradient_checkpointing)
    return passes * 2 * base.weights * tokens / len(summary.prompts)


def paid_after(training: float | None, prompt: float, other: float) -> float | None:
    """Queries after which training a prompt costs fewer FLOPs than the other arm would.

    None if the prompt is not cheaper per query, or the cost of training is unknown.
    """
    if training is None or other <= prompt:
        return None
    return training / (other - prompt)


def _size(layer: FrozenLinear) -> int:
    return layer.in_features * layer.out_features
