"""The layout for families whose attention takes no packed rows: rows side by side, filled up.

Each row of a packed batch is laid behind its own prompt and padded on the right to the longest, one
batch for a packed batch: every rank then gathers every layer once per packed batch, however long
its rows are.

Shape letters: T tokens of a packed batch, B rows, L longest prompt and row together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.packing.packed_batch import Segment, changed


@dataclass(frozen=True)
class PaddedRows:
    """One batch of a packed batch's rows.

    Attributes:
        token_BL: where in the packed batch each token stands; padding repeats the row's last token.
        mask_BL: 1 for tokens, 0 for padding.
        position_BL: positions, counted from the start of the prompt.
        place_T: for each token of a row, its place in the flattened batch.
    """

    token_BL: Tensor
    mask_BL: Tensor
    position_BL: Tensor
    place_T: Tensor


def pad_rows(rows: Sequence[Segment], device: torch.device) -> PaddedRows:
    """Lay out the segments of a packed batch that are rows, not prompts; at least one."""
    assert all(len(row.prefixes) <= 1 for row in rows), "candidates are read as whole rows here"
    start, length, prefix_start, prefix_length = (
        torch.tensor(column)[:, None]
        for column in zip(
            *(
                (row.start, row.length, row.prefix.start if row.prefix else 0, row.prefix_length)
                for row in rows
            ),
            strict=True,
        )
    )
    total = prefix_length + length
    column = torch.arange(int(total.max()))[None]
    own = torch.minimum(column - prefix_length, length - 1)
    token_BL = torch.where(own < 0, prefix_start + column, start + own)
    is_token_BL = column < total
    place_T = torch.zeros(int((start + length).max()), dtype=torch.long)
    of_row_BL = is_token_BL & (own >= 0)
    place_T[token_BL[of_row_BL]] = of_row_BL.flatten().nonzero().flatten()
    padded = PaddedRows(token_BL, is_token_BL.long(), column.expand_as(token_BL), place_T)
    return changed(padded, lambda tensor: tensor.to(device, non_blocking=True))
