"""Read tensors of weight files: headers, rows, and row scales of int8 weights.

A weight in another quantized format has an ``Encoding`` (``trainer.model.encodings``), which
computes its rows from several stored tensors. It is read like a tensor in fp32.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from trainer.runtime.errors import BadInput

#: Called with the bytes read since the last call.
Progress = Callable[[int], None]

#: Types of weights that can be loaded, by name in a safetensors header.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I8": torch.int8,
    "U8": torch.uint8,
}


class Encoding(Protocol):
    """Computes the rows of a weight [..., N, K], or of a vector, from stored tensors."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of the computed values: fp32, or int8 without scales."""

    @property
    def parts(self) -> tuple[StoredTensor, ...]:
        """The stored tensors."""

    def rows(self, read: ReadBytes, start: int, stop: int) -> torch.Tensor:
        """Rows ``start`` to ``stop``; each element of a vector is a row."""


@dataclass(frozen=True)
class StoredTensor:
    """Position and type of a tensor in its file.

    Attributes:
        type: as in the header, for example ``BF16``.
        shape: of the values, also if they are encoded.
        begin: offset of the first byte from the start of the file.
        encoding: computes the values; None if they are stored directly.
    """

    path: Path
    type: str
    shape: tuple[int, ...]
    begin: int
    num_bytes: int
    encoding: Encoding | None = None

    @property
    def dtype(self) -> torch.dtype | None:
        """Type of the values that are read; None if weights of this type cannot be loaded."""
        return self.encoding.dtype if self.encoding else DTYPES.get(self.type)

    @property
    def by_rows(self) -> bool:
        """Whether each row belongs to one output feature, also where the family transposes."""
        return self.encoding is not None or self.dtype == torch.int8

    @property
    def files(self) -> set[Path]:
        """The files from which the values are read."""
        return {part.path for part in self.encoding.parts} if self.encoding else {self.path}


#: Reads a range of the bytes of a stored tensor.
ReadBytes = Callable[[StoredTensor, int, int], torch.Tensor]


def scales_name(name: str) -> str:
    """Name of the row scales of an int8 tensor: bitsandbytes' ``SCB``."""
    module, _, own = name.rpartition(".")
    return f"{module}.SCB" if own == "weight" else f"{name}_SCB"


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Read the header of a safetensors file and return its tensors by name.

    Raises:
        BadInput: if the file is truncated or not a safetensors file.
    """
    try:
        with safe_open(path, framework="pt"):  # the library checks header and size
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header: dict[str, Any] = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        reason = str(error).strip().split("\n")[0]
        raise BadInput(f"{path}: is damaged ({reason}); copy or download it again") from None
    header.pop("__metadata__", None)
    return {
        name: StoredTensor(
            path,
            entry["dtype"],
            tuple(entry["shape"]),
            8 + length + entry["data_offsets"][0],
            entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in header.items()
    }


class SafetensorsReader:
    """Reads tensors or parts of them, counts the bytes and reports them to ``progress``.

    Uses ``pread`` instead of mmap: pages of a mapped file that were read stay resident until it is
    closed, and network file systems read mapped files page by page.
    """

    def __init__(
        self, tensors: Mapping[str, StoredTensor], progress: Progress = lambda _: None
    ) -> None:
        self.tensors, self._progress = tensors, progress
        self.bytes_read = 0
        self._descriptors: dict[Path, int] = {}

    def __enter__(self) -> SafetensorsReader:
        return self

    def __exit__(self, *exc: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def dtype(self, name: str) -> torch.dtype:
        """The stored type of a tensor that ``problem`` has accepted."""
        dtype = self.tensors[name].dtype
        assert dtype is not None, name
        return dtype

    def is_int8(self, name: str) -> bool:
        stored = self.tensors.get(name)
        return stored is not None and stored.dtype == torch.int8

    def problem(self, name: str, shape: Sequence[int]) -> str | None:
        """Compare a tensor's type and shape in the header; None if there is no problem."""
        stored = self.tensors.get(name)
        if stored is None:
            return f"no weight file has the tensor {name!r}"
        if stored.dtype is None:
            return (
                f"{stored.path}: {name!r} is stored as {stored.type}, which cannot be read; "
                "save the model in 16 or 32 bits"
            )
        if stored.shape != tuple(shape):
            return (
                f"{stored.path}: {name!r} has shape {list(stored.shape)}, but config.json "
                f"requires {list(shape)}"
            )
        return None

    def read(self, name: str) -> torch.Tensor:
        """Read a complete tensor in its stored type, as by ``read_flat``."""
        shape = self.tensors[name].shape
        return self.read_flat(name, 0, math.prod(shape)).view(shape)

    def read_row_scales(self, names: Sequence[str]) -> torch.Tensor:
        """Read the fp32 scales of all rows of int8 tensors, concatenated."""
        return torch.cat([self.read(scales_name(name)).flatten() for name in names]).float()

    def read_flat(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Read elements ``start`` to ``stop`` of a flattened tensor.

        Raises:
            BadInput: if they cannot be read or are not finite.
        """
        stored, dtype = self.tensors[name], self.dtype(name)
        if stored.encoding:
            width = stored.shape[-1] if len(stored.shape) > 1 else 1
            first = start // width
            values = stored.encoding.rows(self.read_stored, first, -(-stop // width)).flatten()
            values = values[start - first * width : stop - first * width]
        else:
            first, last = start * dtype.itemsize, stop * dtype.itemsize
            values = self.read_bytes(name, first, last).view(dtype)
        self._check_finite(name, values)
        return values

    def read_into(self, name: str, start: int, target: torch.Tensor, block: int) -> None:
        """Read elements from ``start`` on into ``target``.

        Args:
            target: contiguous vector on the CPU, of the type in which the tensor is stored; the
                tensor is not encoded.
            block: number of elements that are read and checked at a time.

        Raises:
            BadInput: if they cannot be read or are not finite.
        """
        stored, size = self.tensors[name], target.dtype.itemsize
        assert stored.encoding is None, name
        assert stored.dtype == target.dtype, name
        for values in target.split(block):
            self._fill(stored, start * size, values.view(torch.uint8))
            self._check_finite(name, values)
            start += len(values)

    def _check_finite(self, name: str, values: torch.Tensor) -> None:
        if values.is_floating_point() and not torch.isfinite(values).all():
            raise BadInput(f"{self.tensors[name].path}: {name!r} holds NaN or infinite weights")

    def read_bytes(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Read bytes ``start`` to ``stop`` of a tensor that is not encoded."""
        return self.read_stored(self.tensors[name], start, stop)

    def read_stored(self, stored: StoredTensor, start: int, stop: int) -> torch.Tensor:
        """Read bytes ``start`` to ``stop`` of a stored tensor of any type.

        Raises:
            BadInput: if they cannot be read.
        """
        raw = torch.empty(stop - start, dtype=torch.uint8)
        self._fill(stored, start, raw)
        return raw

    def _fill(self, stored: StoredTensor, start: int, target: torch.Tensor) -> None:
        """Read bytes of a stored tensor from ``start`` on into a vector of bytes on the CPU."""
        view, offset, done = target.numpy().data, stored.begin + start, 0
        try:
            if stored.path not in self._descriptors:
                self._descriptors[stored.path] = os.open(stored.path, os.O_RDONLY)
            while done < len(view):
                count = os.preadv(self._descriptors[stored.path], [view[done:]], offset + done)
                if count == 0:
                    raise OSError("the file ends here")
                done += count
        except OSError as error:
            raise BadInput(f"{stored.path}: cannot be read: {error}") from None
        self.bytes_read += done
        self._progress(done)
