"""Seconds of each phase of a run. Imports no torch."""

from __future__ import annotations

import math
from collections import Counter

from trainer.config import Prompt, RunConfig
from trainer.cost_model.hardware import Device
from trainer.cost_model.run_needs import RunNeeds
from trainer.training.halving import rungs

#: Seconds before the base is loaded: imports, connecting ranks, reading rows.
START_SECONDS = 60
#: Seconds of a collective or of a packed batch that do not depend on sizes.
BATCH_SECONDS = 0.005
#: Most and fewest candidates of a search for an initial prompt.
CANDIDATES, FEWEST_CANDIDATES = 64, 8


def phase_seconds(
    needs: RunNeeds, device: Device, step: float, forward: float, load: float, batch_tokens: int
) -> dict[str, float]:
    """Seconds of each phase of a run.

    Args:
        step: seconds of one update of all prompts.
        forward: seconds of scoring one token.
        batch_tokens: of the batches of generation of all ranks.
    """
    config, prompts = needs.config, needs.config.prompts
    each = step / len(prompts)  # of one update of one prompt
    steps = _prompt_steps(config)
    validations = [len(config.evaluation.validated(config.prompt_steps(p))) for p in prompts]
    scored = sum(_init_candidates(config, prompt) for prompt in prompts)
    # Decoding reads the base once per token of a batch of rows.
    token = max(needs.base.resident_bytes(1) / device.memory_rate, BATCH_SECONDS)
    decodes = [
        token * g.new_tokens * math.ceil(g.rows * (g.row_tokens + g.new_tokens) / batch_tokens)
        for g in needs.generations
    ]
    reading = sum(n * t for n, t in zip(validations, needs.validation_tokens, strict=True))
    decoding = sum(n * t for n, t in zip(validations, decodes, strict=True))
    return {
        "start": float(START_SECONDS),
        "loading the base": load,
        "initialization search": scored * each / 2,
        "baselines": needs.baseline_tokens * forward,
        "training": steps * each,
        "validation": reading * forward + decoding,
    }


def _init_candidates(config: RunConfig, prompt: Prompt) -> int:
    """Candidates that ``init: auto`` or ``init: search`` scores for a prompt."""
    if not (prompt.init.open and prompt.entry.searches_init):
        return 0
    budget, texts = config.init_budget(prompt), len(config.init_texts(prompt))
    if texts:  # several are compared, and all of them joined
        return texts + 1 if 1 < texts < budget else 0
    return min(CANDIDATES, budget) if budget >= FEWEST_CANDIDATES else 0


def _prompt_steps(config: RunConfig) -> int:
    """Updates of all prompts together; successive halving stops some of them at rungs."""
    halving, last = config.search.halving, config.last_step
    if halving is None:
        return sum(config.prompt_steps(prompt) for prompt in config.prompts)
    total = 0
    # Each teacher's prompts are compared among themselves.
    for active in Counter((prompt.task, prompt.teacher) for prompt in config.prompts).values():
        before = 0
        for step in [*sorted(rungs(halving, last)), last]:
            total += active * (step - before)
            before, active = step, math.ceil(active / halving.eta)
    return total
