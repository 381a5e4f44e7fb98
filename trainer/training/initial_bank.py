"""The bank of a new run: prompts with their initial values, equal on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config import RunConfig
from trainer.distributed.deepspeed_engine import Engine
from trainer.evaluation.generation import keys_and_values
from trainer.model.checkpoint_files import BaseFiles
from trainer.model.prompted_model import PromptedBase
from trainer.prompts.bank import Bank
from trainer.prompts.init_search import InitScorer
from trainer.training.prompt_optimizer import make_optimizer


def make_bank(
    config: RunConfig,
    engine: Engine,
    base: PromptedBase,
    files: BaseFiles,
    scorer: InitScorer | None,
    warn: Callable[[str], None],
    before: Mapping[str, Sequence[int]] | None = None,
) -> Bank:
    """Create the prompts of a run; a collective.

    Args:
        before: as in ``Bank``.
        scorer: scores candidates of ``init: auto``; None: draw tokens without a search.
    """
    return Bank(
        config,
        embedding_function(base, engine.device),
        files.tokenizer,
        files.config.vocab_size,
        base.hidden_size,
        engine.device,
        make_optimizer=make_optimizer,
        past=lambda ids: keys_and_values(engine, base, ids),
        before=before,
        screen=scorer,
        warn=warn,
    )


def embedding_function(base: nn.Module, device: torch.device) -> Callable[[Sequence[int]], Tensor]:
    """Return the function from token ids [n] to embeddings [n, H]; a call is a collective."""

    @torch.no_grad()
    def embed(token_ids: Any) -> Tensor:
        ids = torch.as_tensor(token_ids, device=device)
        embedded: Tensor = base(ids, []).embeddings_TH.float()
        return embedded

    return embed


def copy_rank_0(engine: Engine, bank: Bank) -> None:
    """Copy rank 0's prompts to all ranks if they differ, as on CPUs that round differently."""
    if len(set(engine.all_gather(bank.digest()))) > 1:
        bank.load_state_dict(engine.run_on_main(bank.state_dict))
