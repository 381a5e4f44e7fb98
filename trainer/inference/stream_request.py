"""What a streaming decoder reads and writes: requests, pieces of text, scored tokens."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from trainer.evaluation.stop_criteria import StopCriteria

#: ``stop``: an end token or a stop string; ``length``: the limit of tokens; ``cancelled``: by the
#: caller, or because the decoder was closed; ``failed``: decoding raised an error.
FinishReason = Literal["stop", "length", "cancelled", "failed"]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0: the most probable token.
        top_p: sample from the fewest most probable tokens whose probabilities add up to this.
        seed: of the request's own random numbers; None: another one for each request.
        top_logprobs: report the log-probability of each token, and this number of the most probable
            ones; None: report none.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    top_logprobs: int | None = None


@dataclass(frozen=True)
class StreamRequest:
    """One text to continue.

    Attributes:
        input_ids: token ids, without virtual tokens.
        prompt: index of the prompt in the decoder's list; None: without a prompt.
        prompt_at: number of tokens before the virtual tokens.
        max_new_tokens: limit of generated tokens, the end token included.
        skip_special_tokens: leave special tokens out of the text.
    """

    input_ids: tuple[int, ...]
    stop: StopCriteria
    max_new_tokens: int
    prompt: int | None = None
    prompt_at: int = 0
    sampling: Sampling = field(default_factory=Sampling)
    skip_special_tokens: bool = True


@dataclass(frozen=True)
class ScoredToken:
    """A generated token.

    Attributes:
        logprob: natural logarithm of the probability that the base gives this token, before
            penalties, temperature and ``top_p``; None unless ``top_logprobs`` is set.
        top: the most probable tokens and their log-probabilities, the most probable first.
    """

    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """Text since the last piece. All texts of a request, one after the other, are its final text.

    Attributes:
        tokens: generated tokens since the last piece. Their text can be in a later piece:
            incomplete characters and beginnings of stop strings are held back.
        finish: set in the last piece of a request.
    """

    text: str
    tokens: tuple[ScoredToken, ...] = ()
    finish: FinishReason | None = None
