"""Measure the error of rounding a base model's weights to int8, in blocks of rows.

A row is rounded to multiples of ``absmax / 127``. The rounding error of a uniform distribution is
``1 / sqrt(12)`` of a step, so the relative error of a row is about ``absmax / RMS / 440``. One
large weight increases the error of its whole row; rows with such outliers are counted.

Shape letters: N rows of a block, K input features.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from trainer.config import Base
from trainer.model.checkpoint_files import BaseFiles
from trainer.model.layers.quantization import dequantize_rows, quantize_rows
from trainer.model.meta_model import build_meta_model, locate_int8_parameters
from trainer.model.safetensors_reader import Progress, SafetensorsReader, scales_name
from trainer.model.tensor_locations import RowReader, TensorLocation

#: A row whose largest weight is more than this many times its root mean square is an outlier.
OUTLIER_RATIO = 20.0
#: Lower bound of a divisor, so that rows of zeros have a finite relative error.
TINY = 1e-300


@dataclass(frozen=True)
class Weight:
    """A weight that a run stores in int8.

    Attributes:
        name: name of a parameter, such as ``model.layers.3.mlp.up_proj``, or of stacked experts.
        group: ``layer 3``, ``embeddings``, ``head``, ``embeddings and head``, or ``other``.
        location: its tensors in the checkpoint.
    """

    name: str
    group: str
    location: TensorLocation


@dataclass(frozen=True)
class WeightError:
    """The rounding error of one weight.

    Attributes:
        squared_error: squared norm of the error; None if the checkpoint stores int8 only.
        largest_row_error: the largest relative error of a row; None as above.
        outlier_rows: number of rows whose largest weight exceeds OUTLIER_RATIO.
    """

    name: str
    group: str
    shape: tuple[int, ...]
    rows: int
    squared_norm: float
    squared_error: float | None
    largest_row_error: float | None
    outlier_rows: int

    @property
    def relative_error(self) -> float | None:
        """``||W - dequantized(W)||_F / ||W||_F``."""
        return relative_error([self])


def relative_error(errors: Sequence[WeightError]) -> float | None:
    """Relative error of several weights together; None if any is stored as int8 only."""
    squared: float = 0.0
    for error in errors:
        if error.squared_error is None:
            return None
        squared += error.squared_error
    return float((squared / max(sum(error.squared_norm for error in errors), TINY)) ** 0.5)


def int8_weights(files: BaseFiles, settings: Base) -> list[Weight]:
    """List all weights that a run with these settings stores in int8, in the order of the model.

    Raises:
        BadInput: tensors are missing or have unexpected shapes; names all, and reads no weight.
    """
    model = build_meta_model(files, settings, torch.float32, torch.device("cpu"))
    table = model.get_input_embeddings().weight
    head = model.get_output_embeddings().weight
    ends = {id(head): "head", id(table): "embeddings and head" if head is table else "embeddings"}

    def group(name: str) -> str:
        layer = re.search(r"\.(\d+)\.", name)
        end = ends.get(id(model.get_parameter(name)))
        return end or (f"layer {layer[1]}" if layer else "other")

    return [
        Weight(name.removesuffix(".weight"), group(name), location)
        for name, location in locate_int8_parameters(model, files).items()
    ]


def measure_weights(
    files: BaseFiles, weights: Sequence[Weight], progress: Progress = lambda _: None
) -> list[WeightError]:
    """Read weights from their files and compare each with its int8 version.

    Raises:
        BadInput: a weight cannot be read or is not finite.
    """
    with SafetensorsReader(files.tensors, progress) as reader:
        return [_measure(weight, reader) for weight in weights]


def stored_bytes(files: BaseFiles, weights: Sequence[Weight]) -> int:
    """Bytes of the weights and their row scales in their files."""
    names = [name for weight in weights for name in weight.location.tensors]
    stored = [files.tensors.get(key) for name in names for key in (name, scales_name(name))]
    return sum(tensor.num_bytes for tensor in stored if tensor)


def _measure(weight: Weight, reader: SafetensorsReader) -> WeightError:
    location, scales = weight.location, None
    if reader.is_int8(location.tensors[0]):
        scales = reader.read_row_scales(location.tensors)
    squared_norm = squared_error = largest_row_error = 0.0
    outlier_rows = 0
    for rows, values_NK in RowReader(location, reader).blocks():
        if scales is not None:
            values_NK = dequantize_rows(values_NK, scales[rows])
        values_NK = values_NK.float()
        norm_N = values_NK.double().square().sum(-1)
        largest_N = values_NK.abs().amax(-1).double()
        outlier_rows += int(
            (largest_N > OUTLIER_RATIO * (norm_N / values_NK.shape[-1]).sqrt()).sum()
        )
        squared_norm += float(norm_N.sum())
        if scales is None:
            rounded_NK = dequantize_rows(*quantize_rows(values_NK))
            error_N = (values_NK - rounded_NK).double().square().sum(-1)
            squared_error += float(error_N.sum())
            row_error = float((error_N / norm_N.clamp_min(TINY)).max() ** 0.5)
            largest_row_error = max(largest_row_error, row_error)
    return WeightError(
        weight.name,
        weight.group,
        tuple(location.shape),
        location.shape[:-1].numel(),
        squared_norm,
        None if scales is not None else squared_error,
        None if scales is not None else largest_row_error,
        outlier_rows,
    )
