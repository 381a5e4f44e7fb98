"""Tensors of safetensors files: headers, rows, row scales of 8-bit weights."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from trainer.runtime.errors import BadInput

#: Types of weights that can be loaded, by their name in a safetensors header.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I8": torch.int8,
    "U8": torch.uint8,
}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in its file.

    Attributes:
        type: as the header names it, for example ``BF16``.
        begin: of its first byte, from the start of the file.
    """

    path: Path
    type: str
    shape: tuple[int, ...]
    begin: int
    num_bytes: int

    @property
    def dtype(self) -> torch.dtype | None:
        """None where weights of this type cannot be loaded."""
        return DTYPES.get(self.type)


def scales_name(name: str) -> str:
    """Where an 8-bit folder keeps the row scales of a tensor: bitsandbytes' ``SCB``."""
    module, _, own = name.rpartition(".")
    return f"{module}.SCB" if own == "weight" else f"{name}_SCB"


def read_header(path: Path) -> dict[str, StoredTensor]:
    """All tensors of a safetensors file.

    Raises:
        BadInput: if the file is cut short or no safetensors file.
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
    """Reads tensors, or rows of them, and counts bytes.

    Reads with ``pread`` into memory of its own: of a mapped file every page that was touched would
    stay resident until the file is closed, and network file systems read maps page by page.
    """

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        self.tensors = tensors
        self.bytes_read = 0
        self._descriptors: dict[Path, int] = {}

    def __enter__(self) -> SafetensorsReader:
        return self

    def __exit__(self, *exc: object) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def find(self, name: str) -> StoredTensor | None:
        """The entry of a tensor in the header of its file; None if no file has it."""
        return self.tensors.get(name)

    def dtype(self, name: str) -> torch.dtype:
        """The type that a tensor is stored in, which ``problem`` has checked."""
        dtype = self.tensors[name].dtype
        assert dtype is not None, name
        return dtype

    def is_int8(self, name: str) -> bool:
        stored = self.find(name)
        return stored is not None and stored.dtype == torch.int8

    def problem(self, name: str, shape: Sequence[int]) -> str | None:
        """What is wrong with a tensor, from the file's header alone; None if nothing is."""
        stored = self.find(name)
        if stored is None:
            return f"no weight file has the tensor {name!r}"
        if stored.dtype is None:
            return (
                f"{stored.path}: {name!r} is stored as {stored.type}, which cannot be read; "
                "save the model in 16 or 32 bits"
            )
        if stored.shape != tuple(shape):
            return (
                f"{stored.path}: {name!r} has shape {list(stored.shape)}, but config.json asks "
                f"for {list(shape)}"
            )
        return None

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor ``name``, in the type it is stored in.

        Raises:
            BadInput: if it cannot be read or is not finite.
        """
        shape = self.tensors[name].shape
        return self.read_flat(name, 0, math.prod(shape)).view(shape)

    def read_flat(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements ``start`` to ``stop`` of a tensor as if it had one dimension.

        Rows follow each other in the file, so rows a to b of [N, K] are elements a * K to b * K.

        Raises:
            BadInput: if they cannot be read or are not finite.
        """
        dtype = self.dtype(name)
        values = self.read_bytes(name, start * dtype.itemsize, stop * dtype.itemsize).view(dtype)
        if values.is_floating_point() and not torch.isfinite(values).all():
            raise BadInput(f"{self.tensors[name].path}: {name!r} holds NaN or infinite weights")
        return values

    def read_bytes(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Bytes ``start`` to ``stop`` of a tensor, whatever its type.

        Raises:
            BadInput: if they cannot be read.
        """
        stored = self.tensors[name]
        raw = torch.empty(stop - start, dtype=torch.uint8)
        self._pread(stored, name, raw, stored.begin + start)
        return raw

    def _pread(self, stored: StoredTensor, name: str, raw: torch.Tensor, offset: int) -> None:
        view, done = raw.numpy().data, 0
        try:
            if stored.path not in self._descriptors:
                self._descriptors[stored.path] = os.open(stored.path, os.O_RDONLY)
            while done < len(view):
                count = os.preadv(self._descriptors[stored.path], [view[done:]], offset + done)
                if count == 0:
                    raise OSError("the file ends here")
                done += count
        except OSError as error:
            raise BadInput(f"{stored.path}: cannot read {name!r}: {error}") from None
        self.bytes_read += done
