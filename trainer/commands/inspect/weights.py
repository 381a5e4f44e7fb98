"""What rounding to int8 does to the weights of a base: tensor by tensor, none is ever held whole.

A row is rounded to steps of ``absmax / 127``, each of which costs ``1 / sqrt(12)`` of a step on
average: the relative error of a row is about ``absmax / RMS / 440``. One large weight makes all
others of its row coarse, which is why such rows are counted.

Shape letters: N rows of a block, K input features.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from trainer.config import Base
from trainer.model.checkpoint_files import BaseFiles
from trainer.model.layers.quantization import dequantize_rows, quantize_rows
from trainer.model.meta_model import build_meta_model, locate_int8_parameters
from trainer.model.safetensors_reader import SafetensorsReader, scales_name
from trainer.model.shard_loading import row_blocks
from trainer.model.tensor_locations import RowReader, TensorLocation

#: A row whose largest weight is more than this many times its root mean square is an outlier.
OUTLIER_RATIO = 20.0
#: Keeps the quotient of a row of zeros finite.
TINY = 1e-300

Progress = Callable[[int], None]


@dataclass(frozen=True)
class Weight:
    """A weight that is int8 in a run.

    Attributes:
        name: of the parameter, such as ``model.layers.3.mlp.up_proj``; or of a stack of experts.
        group: where it belongs: ``layer 3``, ``embeddings``, ``head``, ``embeddings and head``.
        source: where its values stand in the checkpoint.
    """

    name: str
    group: str
    source: TensorLocation


@dataclass(frozen=True)
class WeightError:
    """What int8 does to one weight.

    Attributes:
        squared_norm: of the weight.
        squared_error: of what int8 makes of it; None where there is no original to compare with.
        largest_row_error: relative error of the row that fares worst; None as above.
        outlier_rows: rows whose largest weight is beyond OUTLIER_RATIO.
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
        """``||W - dequantised(W)||_F / ||W||_F``."""
        return relative_error([self])


def relative_error(errors: Sequence[WeightError]) -> float | None:
    """Of several weights as if they were one; None where any has no original."""
    squared: float = 0.0
    for error in errors:
        if error.squared_error is None:
            return None
        squared += error.squared_error
    return float((squared / max(sum(error.squared_norm for error in errors), TINY)) ** 0.5)


def int8_weights(files: BaseFiles, settings: Base) -> list[Weight]:
    """All weights that a run with these settings keeps in int8, in the order of the model.

    Raises:
        BadInput: with every tensor that is missing or of another shape; no weight is read.
    """
    skeleton = build_meta_model(files, settings, torch.float32, torch.device("cpu"))
    table = skeleton.get_input_embeddings().weight
    head = skeleton.get_output_embeddings().weight
    ends = {id(head): "head", id(table): "embeddings and head" if head is table else "embeddings"}
    parameters = dict(skeleton.named_parameters())
    return [
        Weight(name.removesuffix(".weight"), _group(name, ends.get(id(parameters[name]))), source)
        for name, source in locate_int8_parameters(skeleton, files).items()
    ]


def _group(name: str, end: str | None) -> str:
    layer = re.search(r"\.(\d+)\.", name)
    return end or (f"layer {layer[1]}" if layer else "other")


def measure_weights(
    files: BaseFiles, weights: Sequence[Weight], progress: Progress = lambda _: None
) -> list[WeightError]:
    """Read weights from their files and compare each with what int8 makes of it.

    Args:
        progress: called with the bytes read since the last call.

    Raises:
        BadInput: if a weight cannot be read or is not finite.
    """
    with SafetensorsReader(files.tensors) as reader:
        return [_measure(weight, reader, progress) for weight in weights]


def stored_bytes(files: BaseFiles, weights: Sequence[Weight]) -> int:
    """Bytes of the weights in their files."""
    with SafetensorsReader(files.tensors) as reader:
        found = [reader.find(name) for weight in weights for name in weight.source.tensors]
    return sum(stored.num_bytes for stored in found if stored is not None)


def _measure(weight: Weight, reader: SafetensorsReader, progress: Progress) -> WeightError:
    source, scales = weight.source, None
    if reader.is_int8(source.tensors[0]):
        # Rows that were quantised are stored as rows, whatever the layout of the original.
        source = replace(source, transposed=False)
        names = [scales_name(name) for name in source.tensors]
        scales = torch.cat([reader.read(name).flatten() for name in names]).float()
    num_rows, width = source.shape[:-1].numel(), source.shape[-1]
    rows = RowReader(source, reader)
    squared_norm = squared_error = largest_row_error = 0.0
    outlier_rows = 0
    for first, last in row_blocks(0, num_rows, width):
        before = reader.bytes_read
        values_NK = rows.read(first, last)
        if scales is not None:
            values_NK = dequantize_rows(values_NK, scales[first:last])
        values_NK = values_NK.float()
        norm_N = values_NK.double().square().sum(-1)
        largest_N = values_NK.abs().amax(-1).double()
        outlier_rows += int((largest_N > OUTLIER_RATIO * (norm_N / width).sqrt()).sum())
        squared_norm += float(norm_N.sum())
        if scales is None:
            rounded_NK = dequantize_rows(*quantize_rows(values_NK))
            error_N = (values_NK - rounded_NK).double().square().sum(-1)
            squared_error += float(error_N.sum())
            row_error = float((error_N / norm_N.clamp_min(TINY)).max() ** 0.5)
            largest_row_error = max(largest_row_error, row_error)
        progress(reader.bytes_read - before)
    return WeightError(
        weight.name,
        weight.group,
        tuple(weight.source.shape),
        num_rows,
        squared_norm,
        None if scales is not None else squared_error,
        None if scales is not None else largest_row_error,
        outlier_rows,
    )
