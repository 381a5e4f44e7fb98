"""Keys and values of a prompt in the key-value cache of a decoder.

Shape letters: B rows, P virtual tokens, L layers, A heads of keys, D head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig


class PastCache(DynamicCache):
    """Key-value cache that replaces the keys and values at the positions of a prompt.

    Rows are padded on the left. If the prompt came first in the cache, padding would separate it
    from the text and shift every attention window. Instead, the P positions directly before each
    row's text are processed like virtual tokens, and their keys and values are replaced in every
    layer before attention reads them.
    """

    def __init__(self, config: PretrainedConfig | None = None) -> None:
        """Make an empty cache.

        Args:
            config: of a model with recurrent layers, whose states are kept as well.
        """
        super().__init__(config=config)
        self._placed: list[tuple[Tensor, Tensor, Tensor]] = []

    def place(self, past_PL2AD: Tensor, pads_B: Tensor, rows_B: Tensor | None = None) -> None:
        """Set the keys and values that replace those after each row's padding in the next forward.

        Call it once for each prompt of the batch.

        Args:
            past_PL2AD: rotated keys and values, as layers pass them to the cache.
            pads_B: number of padding tokens of each row of this prompt.
            rows_B: indices of these rows in the batch; None for all rows.
        """
        places_P = torch.arange(len(past_PL2AD), device=pads_B.device)
        if rows_B is None:
            rows_B = torch.arange(len(pads_B), device=pads_B.device)
        self._placed.append((past_PL2AD, rows_B[:, None], pads_B[:, None] + places_P))

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if self._placed and self.get_seq_length(layer_idx) == 0:
            key_states = self._replaced(key_states, layer_idx, 0)
            value_states = self._replaced(value_states, layer_idx, 1)
        updated: tuple[Tensor, Tensor] = super().update(
            key_states, value_states, layer_idx, *args, **kwargs
        )
        return updated

    def read(self) -> Tensor:
        """Keys and values of a cache with one row, [T, L, 2, A, D]."""
        layers = [torch.stack([layer.keys[0], layer.values[0]]) for layer in self.layers]
        return torch.stack(layers).permute(3, 0, 1, 2, 4)

    def _replaced(self, states_BATD: Tensor, layer: int, part: int) -> Tensor:
        """Replace keys (part 0) or values (part 1) of a layer."""
        states_BTAD = states_BATD.transpose(1, 2).clone()
        for past_PL2AD, rows_B1, places_BP in self._placed:
            states_BTAD[rows_B1, places_BP] = past_PL2AD[:, layer, part].to(states_BTAD.dtype)
        return states_BTAD.transpose(1, 2)
