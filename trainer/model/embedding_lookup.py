"""Read the embeddings of some tokens from a base's files without loading the base.

Shape letters: H hidden size, n tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.config import Base
from trainer.model.checkpoint_files import BaseFiles
from trainer.model.layers.embedding import FrozenEmbedding
from trainer.model.layers.quantization import quantize_rows
from trainer.model.meta_model import build_meta_model
from trainer.model.safetensors_reader import SafetensorsReader
from trainer.model.tensor_locations import RowReader, locate_parameters


def read_token_embeddings(
    files: BaseFiles, settings: Base, dtype: torch.dtype, token_ids: Sequence[int]
) -> Tensor:
    """Return token embeddings [n, H] as the loaded base computes them, in ``dtype``.

    Raises:
        BadInput: if the base cannot be loaded.
    """
    model = build_meta_model(files, settings, dtype, torch.device("cpu"))
    table = model.get_input_embeddings()
    assert isinstance(table, FrozenEmbedding), table
    path = next(name for name, module in model.named_modules() if module is table)
    location = locate_parameters(model, files.parameters, files.tensors)[f"{path}.weight"]
    with SafetensorsReader(files.tensors) as reader:
        rows = RowReader(location, reader)
        rows_nH = torch.cat([rows.read(i, i + 1) for i in token_ids])
        if table.weight.dtype == torch.int8:
            if reader.is_int8(location.tensors[0]):
                table.absmax = reader.read_row_scales(location.tensors)[list(token_ids)]
            else:
                rows_nH, table.absmax = quantize_rows(rows_nH)
    table.hold(rows_nH, None)
    embedded_nH: Tensor = table(torch.arange(len(token_ids)))
    return embedded_nH
