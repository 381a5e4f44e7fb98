"""Compute rows of weights from quantized formats: scaled 8-bit blocks and MXFP4.

Each encoding reads only the bytes of the requested rows and their scales.

Shape letters: N output features, K input features, n requested rows, S columns of the scales.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trainer.model.safetensors_reader import ReadBytes, StoredTensor

#: Types of scaled values, and of scales that are not exponents, by name in a safetensors header.
VALUE_TYPES = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
}
SCALE_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16}
SCALE_TYPES["BF16"] = torch.bfloat16
#: Types of scales that are powers of two, stored as biased exponents (OCP MX specification 1.0).
EXPONENT_TYPES = ("U8", "F8_E8M0")
EXPONENT_BIAS = 127
#: Values of FP4 (E2M1) by their four bits (OCP MX specification 1.0, table 5).
_FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
FP4_VALUES = _FP4 + [-value for value in _FP4]


@dataclass(frozen=True)
class PackedInt8:
    """int8 values [N, K], four in an int32, the first in its lowest byte (compressed-tensors).

    Bytes are unsigned: 128 is zero.

    Attributes:
        words: [N, K / 4], rounded up.
        columns: K.
    """

    words: StoredTensor
    columns: int
    dtype: ClassVar[torch.dtype] = torch.int8

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        return (self.words,)

    def rows(self, read: ReadBytes, start: int, stop: int) -> Tensor:
        size = 4 * self.words.shape[-1]
        unsigned = read(self.words, start * size, stop * size).view(-1, size)[:, : self.columns]
        return (unsigned ^ 128).view(torch.int8)


@dataclass(frozen=True)
class PackedZeroPoints:
    """int8 zero points [N, S], four rows in a row of int32, like ``PackedInt8``.

    Attributes:
        words: [N / 4, S], rounded up.
    """

    words: StoredTensor
    dtype: ClassVar[torch.dtype] = torch.int8

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        return (self.words,)

    def rows(self, read: ReadBytes, start: int, stop: int) -> Tensor:
        first, size = start // 4, 4 * self.words.shape[-1]
        raw = read(self.words, first * size, -(-stop // 4) * size)
        rows = raw.view(-1, size // 4, 4).transpose(1, 2).flatten(0, 1)
        return (rows[start - 4 * first : stop - 4 * first] ^ 128).view(torch.int8)


@dataclass(frozen=True)
class ScaleGrid:
    """Scales of the blocks of [..., N, K]: one per ``block`` of rows and columns.

    Attributes:
        shape: rows and columns of the scales of one matrix.
        shared: all matrices of a stack have the same scales.
    """

    stored: StoredTensor
    shape: tuple[int, int]
    block: tuple[int, int]
    shared: bool

    @classmethod
    def fit(
        cls, stored: StoredTensor, shape: Sequence[int], blocks: Sequence[tuple[int, int]]
    ) -> ScaleGrid | None:
        """Match the shape of the scales with that of the weight; None if it does not match.

        Args:
            blocks: sizes of blocks that config.json declares; they need not divide the shape.
        """
        matrices, (n, k) = math.prod(shape[:-2]), shape[-2:]
        count = math.prod(stored.shape)
        if count == 1:
            return cls(stored, (1, 1), (n, k), shared=True)
        if len(stored.shape) == 1 and count == (n if matrices == 1 else matrices):
            grid = (n, 1) if matrices == 1 else (1, 1)
        elif len(stored.shape) == len(shape) and stored.shape[:-2] == tuple(shape[:-2]):
            grid = (stored.shape[-2], stored.shape[-1])
        else:
            return None
        for rows, columns in blocks:
            if grid == (-(-n // rows), -(-k // columns)):
                return cls(stored, grid, (rows, columns), shared=False)
        if 0 in grid or n % grid[0] or k % grid[1]:
            return None
        return cls(stored, grid, (n // grid[0], k // grid[1]), shared=False)

    def rows(self, read: ReadBytes, start: int, stop: int, n: int) -> Tensor:
        """Scales [stop - start, S] of rows of matrices with ``n`` rows."""
        row = torch.arange(start, stop)
        matrix = torch.zeros_like(row) if self.shared else row // n
        index = matrix * self.shape[0] + row % n // self.block[0]
        first, last = int(index[0]), int(index[-1]) + 1
        if self.stored.encoding:
            return self.stored.encoding.rows(read, first, last).float()[index - first]
        size = self.stored.num_bytes // math.prod(self.stored.shape) * self.shape[1]
        raw = read(self.stored, first * size, last * size)
        return _scales(raw, self.stored.type).view(-1, self.shape[1])[index - first]


def _scales(raw: Tensor, kind: str) -> Tensor:
    if kind in EXPONENT_TYPES:
        return torch.exp2(raw.float() - EXPONENT_BIAS)
    if kind == "I8":
        return raw.view(torch.int8).float()
    return raw.view(SCALE_TYPES[kind]).float()


@dataclass(frozen=True)
class ScaledBlocks:
    """FP8 or int8 values [..., N, K], minus zero points if given, times the scales of blocks."""

    values: StoredTensor
    scales: ScaleGrid
    zero_points: ScaleGrid | None = None
    dtype: ClassVar[torch.dtype] = torch.float32

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        grids = (self.scales, self.zero_points)
        return (self.values, *(grid.stored for grid in grids if grid))

    def rows(self, read: ReadBytes, start: int, stop: int) -> Tensor:
        n, k = self.values.shape[-2:]
        if self.values.encoding:
            values_nK = self.values.encoding.rows(read, start, stop).float()
        else:
            raw = read(self.values, start * k, stop * k)
            values_nK = raw.view(VALUE_TYPES[self.values.type]).view(-1, k).float()
        if self.zero_points:
            values_nK -= self._expand(self.zero_points, read, start, stop)
        if self.scales.shape[1] * self.scales.block[1] == k:
            blocks = values_nK.view(len(values_nK), self.scales.shape[1], -1)
            blocks *= self.scales.rows(read, start, stop, n)[..., None]
        else:
            values_nK *= self._expand(self.scales, read, start, stop)
        return values_nK

    def _expand(self, grid: ScaleGrid, read: ReadBytes, start: int, stop: int) -> Tensor:
        n, k = self.values.shape[-2:]
        return grid.rows(read, start, stop, n).repeat_interleave(grid.block[1], 1)[:, :k]


@dataclass(frozen=True)
class Mxfp4Blocks:
    """FP4 values, two per byte, in blocks of 32 with a shared exponent (OCP MX specification 1.0).

    Attributes:
        values: bytes [..., N, S, 16]; the low four bits are the first value.
        exponents: [..., N, S].
    """

    values: StoredTensor
    exponents: StoredTensor
    dtype: ClassVar[torch.dtype] = torch.float32

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        return self.values, self.exponents

    def rows(self, read: ReadBytes, start: int, stop: int) -> Tensor:
        groups, size = self.values.shape[-2:]
        pairs = read(self.values, start * groups * size, stop * groups * size).int()
        scales = _scales(read(self.exponents, start * groups, stop * groups), "U8")
        low_high = [[FP4_VALUES[pair & 15], FP4_VALUES[pair >> 4]] for pair in range(256)]
        values = torch.nn.functional.embedding(pairs, torch.tensor(low_high))
        blocks = values.view(-1, groups, 2 * size)
        blocks *= scales.view(-1, groups, 1)
        return blocks.flatten(1)


@dataclass(frozen=True)
class RowScales:
    """Row scales of int8 weights as bitsandbytes stores them: 127 times the factor of a row.

    Attributes:
        grid: one factor per row, or one for all rows.
        num_rows: of one matrix.
    """

    grid: ScaleGrid
    num_rows: int
    dtype: ClassVar[torch.dtype] = torch.float32

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        return (self.grid.stored,)

    def rows(self, read: ReadBytes, start: int, stop: int) -> Tensor:
        return self.grid.rows(read, start, stop, self.num_rows)[:, 0] * 127.0
