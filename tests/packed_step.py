"""A training step of a base of any family, to compare its numbers on two devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.family_bases import CASES, PROMPT_LENGTHS, problem
from tests.soft_prompts import soft_prompts
from trainer.distributed.prefetch import prepare_batch
from trainer.model.attention.prefix_cache import PastCache
from trainer.model.decode_step import DecodeStep
from trainer.model.families import FAMILIES
from trainer.model.prompted_model import PromptedBase
from trainer.packing.packed_batch import PackedBatch
from trainer.packing.packed_row import PackedRow
from trainer.prompts.soft_prompt import SoftPrompt, prompt_lengths
from trainer.training.step import batch_objective, label_counts

#: Cases of families without prefix tuning.
WITHOUT = [case for case, (family, _) in CASES.items() if FAMILIES[family].no_prefix_tuning]
#: Cases and products that are not those of ``dequantize``.
PRODUCTS = [("llama", "int8"), ("olmo", "int8"), ("bloom", "int8"), ("llama", "int8_outliers")]
#: Cases in bfloat16, in which GPUs compute by default.
IN_BF16 = ["llama", "gemma2", "gptj", "bloom", "opt-projected", "gpt_oss", "deepseek_v3", "bamba"]
#: Activations beyond this are outliers of ``int8_outliers``.
OUTLIERS = 2.0


def text_past(base: PromptedBase, token_ids: Sequence[int]) -> Tensor:
    """Keys and values that the base makes of a text, [n, L, 2, A, D]."""
    ids = torch.tensor([list(token_ids)])
    cache = PastCache()
    with torch.no_grad(), base.unpacked():
        base(DecodeStep(ids, torch.ones_like(ids), cache), [])
    return cache.read()


def pasts(base: PromptedBase) -> list[Tensor]:
    """Two prefixes that are not what any text would give."""
    generator = torch.Generator().manual_seed(3)
    shape = text_past(base, [5]).shape[1:]
    return [torch.randn(n, *shape, generator=generator) * 0.5 for n in PROMPT_LENGTHS]


@dataclass(frozen=True)
class PackedStep:
    """Eight rows, which alternate between prompts of tokens and, if possible, prefixes."""

    rows: list[PackedRow]
    prompts: list[Tensor]

    @staticmethod
    def of(case: str, base: PromptedBase) -> PackedStep:
        """Make the step of a case, given its base on the CPU."""
        rows, prompts = problem(base.hidden_size)
        if case not in WITHOUT and base.packed:
            prompts += pasts(base)
        numbered = [PackedRow(rows[i % len(rows)].example, i % len(prompts), i) for i in range(8)]
        return PackedStep(numbered, prompts)

    def on(self, device: torch.device) -> tuple[PackedBatch, list[SoftPrompt]]:
        """Return the batch, prepared in host memory and copied to the device, and the prompts."""
        soft = soft_prompts(p.to(device, copy=True).requires_grad_() for p in self.prompts)
        return prepare_batch(self.rows, prompt_lengths(soft), device).to(device), soft

    def gradients(
        self, base: PromptedBase, batch: PackedBatch, prompts: Sequence[SoftPrompt]
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the loss and the gradient of each prompt, on the device."""
        objective, _ = batch_objective(base, batch, prompts, label_counts(self.rows, len(prompts)))
        gradients = torch.autograd.grad(objective, [prompt.tensor for prompt in prompts])
        return objective.detach(), list(gradients)
