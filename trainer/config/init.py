"""Settings of a prompt's initial values."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from trainer.config.types import PathText, Section


class Init(Section):
    """Initial values of the virtual tokens or, in p_tuning, of the encoder's input.

    In prefix_tuning: the keys and values that the base model computes from the text, the labels or
    the drawn tokens. Shorter texts are repeated, longer ones are cut to num_virtual_tokens. Give
    exactly one field.
    """

    auto: bool = Field(
        False,
        description="search the tokens with the lowest loss on the rows of the first update: "
        "candidates are the task's hand_written prompts, its choices, 16 random drawings of "
        "frequent tokens and 48 prompts that a genetic search derives from the best of these; "
        "encoder lstm: random frequent tokens, without a search",
    )
    text: str | None = Field(
        None, min_length=1, description="embeddings of the tokens of this text, repeated"
    )
    labels: bool = Field(
        False,
        description="embeddings of the task's choices as they occur in rows: the first token of "
        "every choice, then the second of every choice and so on, repeated",
    )
    vocab: bool = Field(
        False, description="embeddings of random tokens among the 5000 most frequent of the base"
    )
    random: bool = Field(
        False,
        description="normal noise with the root mean square of the token embeddings, or of the "
        "base's keys and values",
    )
    zero: bool = Field(False, description="zeros; prefix_tuning only")
    from_: PathText | None = Field(
        None,
        alias="from",
        min_length=1,
        description="a trained prompt of any task and length: an adapter folder, or the output_dir "
        "of a run with one prompt; an encoder of p_tuning is initialized to produce it",
    )

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        """Read ``init: vocab`` as ``{vocab: true}``, and so on."""
        short = ("auto", "vocab", "labels", "random", "zero")
        return {value: True} if value in short else value

    @model_validator(mode="after")
    def _one(self) -> Init:
        texts = [self.text is not None, self.from_ is not None]
        if sum([*texts, self.auto, self.labels, self.vocab, self.random, self.zero]) != 1:
            raise ValueError("give exactly one of auto, text, labels, vocab, random, zero, from")
        return self
