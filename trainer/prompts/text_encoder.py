"""Text encoder of p-tuning: maps a text prompt to virtual tokens.

Prompts with the same ``share`` train one reader, each with its own text. After training, the reader
turns new texts into prompts: ``promptshard export RUN_DIR OUT --encoder NAME --text TEXT``.

Shape letters: P virtual tokens, H hidden size of the base, E hidden size of the encoder, n tokens
of a text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from trainer.config.ranking import LAST, ScoreKey
from trainer.prompts.encoders import EncoderInputs, PromptEncoder, uniform_linear
from trainer.prompts.initializers import embed_text

#: Initial standard deviation of the elements of queries. Each query then attends to few tokens, and
#: the output is about as large as a token embedding.
SHARPNESS = 3.0
#: Longest wavelength of the position encoding (Vaswani et al. 2017, arXiv 1706.03762, section 3.5).
LONGEST_WAVE = 10_000.0


def build(inputs: EncoderInputs) -> TextEncoder:
    """Build the encoder of one prompt's text, with the reader of its share."""
    prompt = inputs.prompt
    assert prompt.init.text is not None
    reader = inputs.shared(
        lambda: TextReader(
            prompt.num_virtual_tokens,
            inputs.hidden_size,
            inputs.encoder_hidden_size,
            inputs.generator,
        )
    )
    return TextEncoder(reader, embed_text(prompt.init.text, inputs.vocabulary))


class TextReader(nn.Module):
    """Maps a text's token embeddings to virtual tokens: P learned queries attend to the tokens.

    P-tuning (Liu et al. 2021, arXiv 2103.10385) with a text prompt instead of pseudo tokens, so the
    weights can be shared between tasks and applied to the text of a new task. A virtual token is
    the attention-weighted mean of the token embeddings, plus a projection of their values that is
    initially zero.

    Args:
        generator: draws the weights.
    """

    def __init__(
        self,
        num_virtual_tokens: int,
        hidden_size: int,
        encoder_hidden_size: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        drawn_PE = torch.randn(num_virtual_tokens, encoder_hidden_size, generator=generator)
        self.queries = nn.Parameter(SHARPNESS * drawn_PE)
        self.keys = uniform_linear(hidden_size, encoder_hidden_size, generator)
        self.values = uniform_linear(hidden_size, encoder_hidden_size, generator)
        self.output = uniform_linear(encoder_hidden_size, hidden_size, generator)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    @classmethod
    def of(cls, weights: Mapping[str, Tensor]) -> TextReader:
        """Create a trained reader from its state dict."""
        num_virtual_tokens, encoder_hidden_size = weights["queries"].shape
        hidden_size = weights["keys.weight"].shape[1]
        reader = cls(num_virtual_tokens, hidden_size, encoder_hidden_size, torch.Generator())
        reader.load_state_dict(dict(weights))
        return reader

    def forward(self, words_nH: Tensor) -> Tensor:
        """Map token embeddings [n, H] to virtual tokens [P, H], fp32."""
        # Normalized, because token embeddings can have any scale.
        normed_nH = nn.functional.layer_norm(words_nH, words_nH.shape[1:])
        places_nE = _positions(len(words_nH), self.queries.shape[1])
        places_nE = places_nE.to(words_nH, non_blocking=True)
        keys_nE = self.keys(normed_nH) + places_nE
        scores_Pn = self.queries @ keys_nE.T / math.sqrt(self.queries.shape[1])
        weights_Pn = scores_Pn.softmax(dim=1)
        pooled_PE = nn.functional.gelu(weights_Pn @ self.values(normed_nH))
        prompt_PH: Tensor = weights_Pn @ words_nH + self.output(pooled_PE)
        return prompt_PH


class TextEncoder(PromptEncoder):
    """A reader applied to the token embeddings of one text, which are frozen and not saved."""

    keeps_best_weights = True

    def __init__(self, shared: TextReader, words_nH: Tensor) -> None:
        super().__init__(words_nH)
        self.shape = torch.Size((len(shared.queries), words_nH.shape[1]))
        self.shared = shared
        self.words_nH: Tensor
        self.register_buffer("words_nH", words_nH, persistent=False)

    def forward(self) -> Tensor:
        prompt_PH: Tensor = self.shared(self.words_nH)
        return prompt_PH


def _positions(length: int, width: int) -> Tensor:
    """Compute the sinusoidal position encoding, [length, width]."""
    half = (width + 1) // 2
    frequencies = LONGEST_WAVE ** (-torch.arange(half) / half)
    angles = torch.arange(length)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :width]


#: Returns the weights of a reader that are validated (averaged with ``ema``), by name.
Judged = Callable[[], Mapping[str, Tensor]]


class BestEncoder:
    """Keeps a copy of the weights of a reader at its best validation.

    Validations are compared by the mean metric of the reader's prompts, then by their mean loss. A
    stopped prompt counts with its last scores, so that means stay comparable. Without validation,
    the newest weights are kept.
    """

    def __init__(self, judged: Judged) -> None:
        self._judged = judged
        self._step, self._best = 0, LAST
        self._keys: dict[str, ScoreKey] = {}
        self._weights: dict[str, Tensor] = {}

    def update(self, step: int, keys: Mapping[str, ScoreKey | None]) -> None:
        """Keep the current weights if they are the best so far; ``keys`` as in ``Bank``."""
        validated = {name: key for name, key in keys.items() if key is not None}
        if LAST in validated.values():
            return
        self._keys |= validated
        mean = _mean(list(self._keys.values())) if self._keys else LAST
        if mean < self._best or not self._keys:
            self._step, self._best = step, mean
            weights = self._judged()
            self._weights = {
                name: value.detach().to("cpu", copy=True) for name, value in weights.items()
            }

    def state_dict(self) -> dict[str, Any]:
        """Return the kept weights by name, and the scores of their validation."""
        return {
            "step": self._step,
            "best": list(self._best),
            "keys": {name: list(key) for name, key in self._keys.items()},
            **self._weights,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of ``state_dict``, or that of an older version, which ranked by loss.

        From an older state, the loss is used as the metric too. It ranks below any metric for which
        higher is better, so the next validation replaces the weights.
        """
        self._weights = {k: v.clone() for k, v in state.items() if isinstance(v, Tensor)}
        self._step = int(state["step"])
        if "losses" in state:
            self._best = (float(state["loss"]), float(state["loss"]))
            self._keys = {name: (loss, loss) for name, loss in state["losses"].items()}
        else:
            self._best = _pair(state["best"])
            self._keys = {name: _pair(key) for name, key in state["keys"].items()}


def _pair(values: Sequence[float]) -> ScoreKey:
    value, loss = values
    return float(value), float(loss)


def _mean(keys: Sequence[ScoreKey]) -> ScoreKey:
    values, losses = zip(*keys, strict=True)
    return sum(values) / len(keys), sum(losses) / len(keys)
