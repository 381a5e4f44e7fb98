"""Settings of a prompt's initial values."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from trainer.config.types import PathText, Section
from trainer.runtime.errors import did_you_mean

#: Fields that can be written alone: ``init: vocab`` is ``{vocab: true}``.
SHORT_FORMS = ("auto", "search", "vocab", "labels", "random", "zero")


class Init(Section):
    """Initial values of the virtual tokens or, in p_tuning, of the encoder's input.

    In prefix_tuning: the keys and values that the base model computes from the text, the labels or
    the drawn tokens. Shorter texts are repeated, longer ones are cut to num_virtual_tokens. Give
    exactly one field.
    """

    auto: bool = Field(
        False,
        description="start from the best of the task's hand_written prompts\n"
        "The best has the lowest loss on the rows of the first update. A task without them: its "
        "system text; without both, as search. Encoder lstm: random frequent tokens.",
    )
    search: bool = Field(
        False,
        description="search the tokens with the lowest loss on the rows of the first update\n"
        "Candidates are the task's hand_written prompts, its choices, 16 random drawings of "
        "frequent tokens and 48 prompts that a genetic search derives from the best of these. Not "
        "available for encoder lstm.",
    )
    text: str | None = Field(
        None, min_length=1, description="start from the embeddings of this text's tokens, repeated"
    )
    labels: bool = Field(
        False,
        description="start from the embeddings of the task's choices\n"
        "As they occur in rows: the first token of every choice, then the second of every choice "
        "and so on, repeated.",
    )
    vocab: bool = Field(
        False,
        description="start from random tokens among the 5000 most frequent of the base",
    )
    random: bool = Field(
        False,
        description="start from normal noise\n"
        "Its root mean square is that of the token embeddings, or of the base's keys and values.",
    )
    zero: bool = Field(False, description="start from zeros; method prefix_tuning only")
    from_: PathText | None = Field(
        None,
        alias="from",
        min_length=1,
        description="start from a trained prompt, of any task and length\n"
        "An adapter folder such as runs/first/prompts/NAME, or the output_dir of a run with one "
        "prompt. An encoder of p_tuning is initialized to produce it.",
    )

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        if value not in SHORT_FORMS:
            hint = did_you_mean(value, SHORT_FORMS)
            raise ValueError(
                f"{value[:80]!r} is not one of {', '.join(SHORT_FORMS)}{hint}; to start from a "
                "text, write {text: ...}"
            )
        return {value: True}

    @model_validator(mode="after")
    def _one(self) -> Init:
        texts = [self.text is not None, self.from_ is not None]
        if (
            sum([*texts, self.auto, self.search, self.labels, self.vocab, self.random, self.zero])
            != 1
        ):
            raise ValueError(
                "give exactly one of auto, search, text, labels, vocab, random, zero, from"
            )
        return self

    @property
    def open(self) -> bool:
        """Whether the initial tokens are chosen by their loss."""
        return self.auto or self.search
