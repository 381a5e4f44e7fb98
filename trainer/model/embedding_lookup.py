"""Word embeddings of a few tokens, read from a base's files without loading it.

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
from trainer.model.safetensors_reader import SafetensorsReader, scales_name
from trainer.model.tensor_locations import RowReader, locate_parameters


def read_token_embeddings(
    files: BaseFiles, settings: Base, dtype: torch.dtype, token_ids: Sequence[int]
) -> Tensor:
    """Word embeddings [n, H] as the loaded base gives them, in ``dtype``.

    Args:
        dtype: type of activations in the run.

    Raises:
        BadInput: if the base cannot be loaded.
    """
    skeleton = build_meta_model(files, settings, dtype, torch.device("cpu"))
    table = skeleton.get_input_embeddings()
    assert isinstance(table, FrozenEmbedding), table
    path = next(name for name, module in skeleton.named_modules() if module is table)
    sources = locate_parameters(skeleton, files.parameters.tensors)
    source = sources[f"{path}.weight"]
    (name,) = source.tensors
    with SafetensorsReader(files.tensors) as reader:
        rows = RowReader(source, reader)
        words_nH = torch.cat([rows.read(i, i + 1) for i in token_ids])
        if table.weight.dtype == torch.int8:
            if reader.is_int8(name):
                table.absmax = reader.read(scales_name(name)).flatten()[list(token_ids)].float()
            else:
                words_nH, table.absmax = quantize_rows(words_nH)
    table.hold(words_nH, None)
    embedded_nH: Tensor = table(torch.arange(len(token_ids)))
    return embedded_nH
