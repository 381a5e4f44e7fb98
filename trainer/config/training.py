"""Settings of training, validation, the search among prompts, and checkpoints."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from trainer.config import sweep
from trainer.config.types import NonNegativeFloat, NonNegativeInt, Number, PositiveInt, Section


class Training(Section):
    """Length of the training and size of a step."""

    steps: PositiveInt = Field(
        description="number of updates of each prompt\nA prompt can override it with its own steps."
    )
    tokens_per_step: PositiveInt = Field(
        8192,
        description="batch size: maximum number of text tokens in one update of a prompt\n"
        "Over all ranks and micro-batches; an update reads as many rows as fit.",
    )
    micro_batch_tokens: Literal["auto"] | Annotated[int, Field(gt=0)] = Field(
        "auto",
        description="maximum number of tokens of one packed batch\n"
        "Changes memory and speed, but not the update.\n"
        "auto: as many as fit in memory and a step needs",
    )
    seed: NonNegativeInt = Field(0, description="seed of everything that has none of its own")
    max_skipped_updates: PositiveInt = Field(
        5, description="stop a prompt after this many consecutive non-finite updates"
    )

    @field_validator("micro_batch_tokens", mode="before")
    @classmethod
    def _check_tokens(cls, value: Any) -> Any:
        number = isinstance(value, int) and not isinstance(value, bool) and value > 0
        if value != "auto" and not number:
            raise ValueError(f"{value!r} is not auto or a number of tokens")
        return value


class EarlyStoppingConfig(Section):
    """Stop a prompt whose validation scores (metric, then loss) no longer improve."""

    patience: PositiveInt = Field(description="validations without improvement before the stop")


class Evaluation(Section):
    """Validation during training."""

    every: PositiveInt = Field(
        50,
        description="steps between validations; the last step is always validated\n"
        "A validation less than half an interval before the last step is omitted.",
    )
    early_stopping: EarlyStoppingConfig | None = Field(
        None,
        description="stop a prompt whose validation scores no longer improve\nnull: never",
    )
    train_rows: NonNegativeInt = Field(
        100,
        description="number of train rows on which prompts are scored at the end, to show "
        "overfitting\nScored are the best prompt of each task, and one of another length. 0: none",
    )

    def validated(self, last: int) -> frozenset[int]:
        """Steps after which a prompt of ``last`` steps is validated.

        At intervals, except less than half an interval before the last step.
        """
        return frozenset({last, *range(self.every, last - (self.every - 1) // 2, self.every)})


class Halving(Section):
    """Successive halving (arXiv 1810.05934): stop the worst prompts of a task at rungs.

    Rungs are the steps first, first * eta, first * eta^2 and so on. At a rung, all active prompts
    are validated. Of the n active prompts of a task, the best ceil(n / eta) continue, by the task's
    metric and then by validation loss. Prompts that learn from a teacher are compared only with
    those of the same teacher.
    """

    eta: Annotated[
        int, Number, Field(ge=2, description="one prompt in eta continues after a rung")
    ] = 3
    first: PositiveInt = Field(description="step of the first rung")


_INIT_SHARE = (
    "maximum cost of choosing initial prompts (init: auto and init: search)\n"
    "As a share of the prompt's training FLOPs. If it allows too few candidates (a search needs "
    "8), the prompt starts from the first hand-written prompt or the labels."
)


class Search(Section):
    """Limits of a sweep and of the search for initial prompts."""

    max_prompts: PositiveInt = Field(
        sweep.MAX_PROMPTS,
        description="maximum number of prompts in a run; a larger sweep is an error",
    )
    halving: Halving | None = Field(
        None,
        description="stop the worst prompts of every task at rungs\nnull: never",
    )
    init_share: NonNegativeFloat = Field(0.1, description=_INIT_SHARE)


class Checkpoint(Section):
    """Checkpoints, from which a stopped run resumes."""

    every: PositiveInt = Field(
        50, description="steps between checkpoints; the last step is always saved"
    )
    keep: PositiveInt = Field(3, description="number of newest checkpoints to keep")
