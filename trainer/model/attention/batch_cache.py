"""Key-value cache of a batch whose rows join and leave while it is decoded.

All rows end at the same column, as with padding on the left, so that attention windows and
positions are those of a batch that started together. Keys and values are in a buffer with room
for more rows and columns: a row that joins copies its own columns, a row that leaves moves one
other row, and a step writes one column. Growing the buffer copies it; as its size grows by a
factor, that adds a constant number of copies per column.

Shape letters: B rows, A heads of keys, T columns, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

#: Spare columns of a new buffer, besides half of its columns.
SPARE_COLUMNS = 32
#: Size of the buffers in multiples of rows times columns: up to twice the rows, and spare columns
#: before and after.
SPARE = 3.5


class BatchCache(Cache):
    """A cache for decode steps of rows that were read, each with its own cache, before.

    Attributes:
        lengths: number of tokens of each row, virtual tokens included.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.lengths: list[int] = []

    @property
    def width(self) -> int:
        """Number of columns: tokens of the longest row."""
        return max(self.lengths, default=0)

    def mask(self, device: torch.device) -> Tensor:
        """Attention mask [B, T + 1] of the next decode step, which adds a token to every row."""
        lengths_B1 = torch.tensor(self.lengths, device=device)[:, None] + 1
        columns = self.width + 1
        return (torch.arange(columns, device=device) >= columns - lengths_B1).long()

    def add(self, cache: Cache, lengths: Sequence[int]) -> None:
        """Add rows after the present ones.

        Args:
            cache: keys and values of the rows, padded on the left.
            lengths: number of tokens of each row.
        """
        if not self.lengths:
            self.layers = [_own(layer) for layer in cache.layers]
        width = max(self.width, *lengths)
        for own, layer in zip(self.layers, cache.layers, strict=True):
            if isinstance(own, _BufferLayer):
                own.add(layer, lengths, width)
            elif not self.lengths:
                _crop(own, width)
            else:
                _append(own, layer, width)
        self.lengths += lengths

    def remove(self, row: int) -> None:
        """Remove a row. The last row takes its place."""
        last = len(self.lengths) - 1
        order = [last if b == row else b for b in range(last)]
        self.lengths = [self.lengths[b] for b in order]
        if not order:
            self.layers = []  # frees the memory
        for layer in self.layers:
            if isinstance(layer, _BufferLayer):
                layer.remove(row, self.width)
            else:
                _select(layer, order)
                _crop(layer, self.width)

    def note_step(self) -> None:
        """Count the token that a decode step has added to every row."""
        self.lengths = [length + 1 for length in self.lengths]


class _BufferLayer(DynamicLayer):
    """Keys and values of one layer, as views of buffers with spare rows and columns.

    Columns before a row's own are zero, because attention multiplies them by a weight of zero.
    """

    def __init__(self) -> None:
        super().__init__()
        self._buffers: list[Tensor] = []
        self._rows = self._start = self._end = 0

    def add(self, layer: Any, lengths: Sequence[int], width: int) -> None:
        """Add the rows of a layer; ``width`` is the number of columns afterwards."""
        parts = [layer.keys, layer.values]
        self._make_room(parts, len(lengths), width)
        first, self._rows = self._rows, self._rows + len(lengths)
        self._start = self._end - width
        for buffer, part in zip(self._buffers, parts, strict=True):
            for i, length in enumerate(lengths):
                row = buffer[first + i]
                row.zero_()
                row[:, self._end - length : self._end] = part[i, :, -length:]
        self._show()

    def remove(self, row: int, width: int) -> None:
        self._rows -= 1
        self._start = self._end - width
        for buffer in self._buffers:
            if row < self._rows:
                buffer[row] = buffer[self._rows]
        self._show()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        assert key_states.shape[2] == 1, "rows are read with their own cache"
        states = [key_states, value_states]
        if self._end == self._buffers[0].shape[2]:
            self._grow(states, self._rows, self._end - self._start)
        for buffer, state in zip(self._buffers, states, strict=True):
            buffer[: self._rows, :, self._end] = state[:, :, 0]
        self._end += 1
        self._show()
        return self.keys, self.values

    def _make_room(self, parts: Sequence[Tensor], rows: int, width: int) -> None:
        """Make room for more rows, and for ``width`` columns up to the present end."""
        needed = self._rows + rows
        capacity = len(self._buffers[0]) if self._buffers else 0
        if needed > capacity or width > self._end:
            self._grow(parts, needed, width)

    def _grow(self, parts: Sequence[Tensor], needed: int, width: int) -> None:
        """Allocate buffers; afterwards ``width`` columns are before the end, and spare ones after.

        A row that joins later may be longer than all present ones, so some are also before those.

        Args:
            needed: number of rows. The new buffers have room for at most twice as many: fewer than
                the old ones if most of their rows have left.
        """
        spare = width // 2 + SPARE_COLUMNS
        old, kept = self._buffers, self._end - self._start
        capacity = len(old[0]) if old else 0
        rows = min(capacity, 2 * needed) if capacity >= needed else max(needed, 2 * self._rows)
        end = spare // 2 + width
        self._buffers = []
        for i, part in enumerate(parts):
            buffer = part.new_zeros(rows, part.shape[1], end + spare, part.shape[3])
            if old:
                rows_kept = old[i][: self._rows, :, self._end - kept : self._end]
                buffer[: self._rows, :, end - kept : end] = rows_kept
            self._buffers.append(buffer)
        self._start, self._end = end - kept, end

    def _show(self) -> None:
        keys, values = self._buffers
        self.keys = keys[: self._rows, :, self._start : self._end]
        self.values = values[: self._rows, :, self._start : self._end]
        self.is_initialized, self.dtype, self.device = True, keys.dtype, keys.device


# Layers with recurrent states or a limited window of keys: their states are copied as a whole.


def _own(layer: Any) -> Any:
    """Return the layer that keeps the states of the batch."""
    # Without keys, the layer reads those of another one.
    is_plain = type(layer) is DynamicLayer and layer.keys is not None
    return _BufferLayer() if is_plain else layer


def _replace(layer: Any, new: Callable[[str, Any, Tensor], Tensor]) -> None:
    """Replace each tensor by ``new(name, key, tensor)``; ``key`` is its key in a dict, or None."""
    for name in ("keys", "values", "conv_states", "recurrent_states"):
        value = getattr(layer, name, None)
        if isinstance(value, dict):
            for key, tensor in value.items():
                value[key] = None if tensor is None else new(name, key, tensor)
        elif value is not None:
            setattr(layer, name, new(name, None, value))


def _select(layer: Any, rows: Sequence[int]) -> None:
    """Keep these rows."""
    _replace(layer, lambda name, key, tensor: tensor[list(rows)])


def _append(layer: Any, other: Any, width: int) -> None:
    """Append the rows of another layer."""

    def joined(name: str, key: Any, tensor: Tensor) -> Tensor:
        added = getattr(other, name) if key is None else getattr(other, name)[key]
        if name in ("keys", "values"):
            columns = max(tensor.shape[2], added.shape[2])
            tensor, added = _with_columns(tensor, columns), _with_columns(added, columns)
        return torch.cat([tensor, added])

    _replace(layer, joined)
    if hasattr(layer, "cumulative_length"):
        layer.cumulative_length = width


def _crop(layer: Any, width: int) -> None:
    """Keep the last ``width`` columns of keys and values."""

    def cropped(name: str, _: Any, tensor: Tensor) -> Tensor:
        return tensor[:, :, -width:] if name in ("keys", "values") else tensor

    _replace(layer, cropped)
    if hasattr(layer, "cumulative_length"):
        layer.cumulative_length = width


def _with_columns(tensor: Tensor, columns: int) -> Tensor:
    """Add columns of zeros on the left."""
    return torch.nn.functional.pad(tensor, (0, 0, columns - tensor.shape[2], 0))
