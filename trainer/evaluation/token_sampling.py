"""How the next token of a row is chosen.

Shape letters: V vocabulary, T tokens of a row.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from trainer.model.generation_config import logits_processors

#: A lower temperature is 0: the largest logits, divided by it, could become infinite.
MIN_TEMPERATURE = 0.01


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


class TokenChooser:
    """Chooses the tokens of one row, with the penalties of the base's generation config.

    Args:
        input_ids: input of the row, without virtual tokens.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        input_ids: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling,
        device: torch.device,
    ) -> None:
        self._sampling = sampling
        self._penalties = logits_processors(model, input_ids, max_new_tokens, device)
        self._warpers = LogitsProcessorList()
        self._random: torch.Generator | None = None
        if sampling.temperature >= MIN_TEMPERATURE:
            self._random = torch.Generator(device)
            seed = sampling.seed
            self._random.manual_seed(secrets.randbits(63) if seed is None else seed)
            if sampling.temperature != 1:
                self._warpers.append(TemperatureLogitsWarper(sampling.temperature))
            if sampling.top_p < 1:
                self._warpers.append(TopPLogitsWarper(sampling.top_p))

    def choose(self, ids: Sequence[int], logits_V: Tensor, largest: int) -> ScoredToken:
        """Choose the token after ``ids``; ``largest`` is the one with the largest logit."""
        token = largest
        if self._penalties or self._random is not None:
            token = self._processed(ids, logits_V[None])
        if (count := self._sampling.top_logprobs) is None:
            return ScoredToken(token)
        logprobs_V = logits_V.log_softmax(-1)
        values, top_ids = logprobs_V.topk(min(count, len(logprobs_V)))
        top = zip(top_ids.tolist(), values.tolist(), strict=True)
        return ScoredToken(token, float(logprobs_V[token]), tuple(top))

    def _processed(self, ids: Sequence[int], scores_1V: Tensor) -> int:
        """Apply penalties and sampling."""
        ids_1T = torch.tensor([list(ids)], device=scores_1V.device)
        for processors in (self._penalties, self._warpers):
            if processors:
                scores_1V = processors(ids_1T, scores_1V)
        probabilities_1V = scores_1V.softmax(-1)
        # A prompt that has diverged gives NaN, for which sampling would raise an error.
        if self._random is None or not bool(probabilities_1V.isfinite().all()):
            return int(scores_1V.argmax(-1))
        return int(torch.multinomial(probabilities_1V, 1, generator=self._random))
