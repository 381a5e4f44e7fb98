"""Padded batches, for families whose attention does not accept packed rows.

Each row of a packed batch is placed after its own prompt and padded on the right to the longest.
One packed batch becomes one padded batch, so every rank gathers every layer once per packed batch.

Shape letters: T tokens of a packed batch, B rows, L longest prompt and row together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.model.attention.bucket_layout import prefix_indices, stack_padded
from trainer.packing.packed_batch import Segment, map_tensors


@dataclass(frozen=True)
class PaddedRows:
    """A padded batch of the rows of one packed batch.

    Attributes:
        token_BL: index of each token in the packed batch; padding repeats the row's last token.
        mask_BL: 1 for tokens, 0 for padding.
        position_BL: positions, counted from the start of the prompt.
        place_T: index in the flattened padded batch of each token; of a prompt's token, one of the
            places where it is repeated.
    """

    token_BL: Tensor
    mask_BL: Tensor
    position_BL: Tensor
    place_T: Tensor


def pad_rows(rows: Sequence[Segment], device: torch.device) -> PaddedRows:
    """Lay out one or more rows, given as the segments that are not prompts.

    A tree of segments becomes several rows, one for each segment that no other one continues.
    """
    end = max(row.end for row in rows)
    continued = {row.prefix for row in rows}
    rows = [row for row in rows if row not in continued]
    own = [torch.arange(row.start, row.end) for row in rows]
    prefixes = [prefix_indices(row)[: row.prefix_length] for row in rows]
    token_BL = stack_padded([torch.cat(pair) for pair in zip(prefixes, own, strict=True)])
    prefix_length = torch.tensor([row.prefix_length for row in rows])[:, None]
    column = torch.arange(token_BL.shape[1])[None]
    is_token_BL = column < prefix_length + torch.tensor([row.length for row in rows])[:, None]
    place_T = torch.zeros(end, dtype=torch.long)
    place_T[token_BL[is_token_BL]] = is_token_BL.flatten().nonzero().flatten()
    padded = PaddedRows(token_BL, is_token_BL.long(), column.expand_as(token_BL), place_T)
    return map_tensors(padded, lambda tensor: tensor.to(device, non_blocking=True))
