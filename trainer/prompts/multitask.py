"""Encoders of which several prompts share a part: what is common to tasks is learnt from them all.

Each prompt has an encoder of its own around one module, ``shared``, that all of a ``share`` hold.

Shape letters: P virtual tokens, H hidden size of the base, E hidden size of the encoder, R rank,
n tokens of a text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from trainer.config import Prompt
from trainer.prompts.encoders import PromptEncoder, uniform_linear

#: Standard deviation of a query's elements at the start: each then attends to few of the words, and
#: what it makes of them is about as loud as a word.
SHARPNESS = 3.0
#: Longest wave of the positions (Vaswani et al. 2017, arXiv 1706.03762, section 3.5).
LONGEST_WAVE = 10_000.0


class TextReader(nn.Module):
    """Turns a text's word embeddings into virtual tokens: P learnt queries attend to the words.

    As p-tuning is described (Liu et al. 2021, arXiv 2103.10385), with a text prompt in place of
    pseudo tokens, so that what is learnt serves many tasks and reads a new task's text unchanged. A
    virtual token is the mean of the words it attends to, plus a projection of their values that
    starts at zero.

    Args:
        generator: draws the weights; they depend on nothing else, least of all on a text.
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
        """A reader that was trained, from its state dict."""
        num_virtual_tokens, encoder_hidden_size = weights["queries"].shape
        hidden_size = weights["keys.weight"].shape[1]
        reader = cls(num_virtual_tokens, hidden_size, encoder_hidden_size, torch.Generator())
        reader.load_state_dict(dict(weights))
        return reader

    def forward(self, words_nH: Tensor) -> Tensor:
        """Virtual tokens [P, H] of a text's word embeddings [n, H], fp32."""
        # Word embeddings are of any scale; keys and values are made of normed ones.
        normed_nH = nn.functional.layer_norm(words_nH, words_nH.shape[1:])
        places_nE = _positions(len(words_nH), self.queries.shape[1]).to(words_nH)
        keys_nE = self.keys(normed_nH) + places_nE
        scores_Pn = self.queries @ keys_nE.T / math.sqrt(self.queries.shape[1])
        weights_Pn = scores_Pn.softmax(dim=1)
        pooled_PE = nn.functional.gelu(weights_Pn @ self.values(normed_nH))
        prompt_PH: Tensor = weights_Pn @ words_nH + self.output(pooled_PE)
        return prompt_PH


class TextEncoder(PromptEncoder):
    """The virtual tokens that a reader makes of one text.

    Args:
        words_nH: word embeddings of the text, frozen; no part of what is saved.
    """

    def __init__(self, shared: TextReader, words_nH: Tensor) -> None:
        super().__init__(words_nH)
        self.shape = torch.Size((len(shared.queries), words_nH.shape[1]))
        self.shared = shared
        self.words_nH: Tensor
        self.register_buffer("words_nH", words_nH, persistent=False)

    def forward(self) -> Tensor:
        prompt_PH: Tensor = self.shared(self.words_nH)
        return prompt_PH


class SharedPrompt(nn.Module):
    """A soft prompt [P, H] that several tasks have in common."""

    def __init__(self, init_PH: Tensor) -> None:
        super().__init__()
        self.embedding = nn.Parameter(init_PH.clone())


class LowRankEncoder(PromptEncoder):
    """Multitask prompt tuning: a shared prompt, times a low-rank matrix of the task's own.

    ``shared * (columns @ rows)``, element by element (Wang et al. 2023, arXiv 2303.02861, section
    3.1; there of rank 1). The product starts as ones, so that every task starts at the shared
    prompt, which the paper distils from trained ones and then multiplies by it.

    Args:
        generator: draws what tells the further ranks apart.
    """

    def __init__(self, shared: SharedPrompt, rank: int, generator: torch.Generator) -> None:
        init_PH = shared.embedding.detach()
        super().__init__(init_PH)
        self.shared = shared
        columns = torch.randn(init_PH.shape[0], rank, generator=generator)
        columns[:, 0] = 1.0
        rows = torch.zeros(rank, init_PH.shape[1])
        rows[0] = 1.0
        self.columns, self.rows = nn.Parameter(columns), nn.Parameter(rows)

    def forward(self) -> Tensor:
        return self.shared.embedding * (self.columns @ self.rows)


def make_part(
    prompt: Prompt, start: Callable[[], Tensor], generator: torch.Generator, hidden_size: int
) -> TextReader | SharedPrompt:
    """What the prompts of a share have in common, on the CPU, as the first of them says.

    Args:
        start: makes the virtual tokens [P, H] that ``init`` says.
        hidden_size: H, also of a reader whose size the run file leaves open.
    """
    if prompt.encoder_name == "low_rank":
        return SharedPrompt(start())
    assert prompt.encoder_name == "text", prompt
    size = prompt.encoder_hidden_size or hidden_size
    return TextReader(prompt.num_virtual_tokens, hidden_size, size, generator)


def _positions(length: int, width: int) -> Tensor:
    """Sines and cosines [length, width] of a token's place: words in another order differ."""
    half = (width + 1) // 2
    frequencies = LONGEST_WAVE ** (-torch.arange(half) / half)
    angles = torch.arange(length)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :width]
