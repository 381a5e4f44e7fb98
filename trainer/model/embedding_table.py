"""Find the base's table of input embeddings in its files, from headers only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from trainer.config import Base
from trainer.model import hub
from trainer.model.base_tokenizer import GGUF, BaseTokenizer, local_path
from trainer.model.families import embedding_scale
from trainer.model.model_folder import find_tensors
from trainer.model.transformers_model import build_transformers_model

#: Types of stored tensors whose rows are embeddings.
_FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class EmbeddingTable:
    """The table of a base's input embeddings.

    Attributes:
        rows: number of embeddings.
        scale: factor of the embeddings of token ids, rounded to the compute type.
        tensor: name in the safetensors files; None if it is not stored as plain rows.
        problem: reason and remedy if ``tensor`` is None; otherwise empty.
    """

    rows: int
    scale: float
    tensor: str | None = None
    problem: str = ""


def find_embedding_table(
    settings: Base, opened: BaseTokenizer, dtype: torch.dtype, *, locate: bool = True
) -> EmbeddingTable:
    """Find the table; of a hub model, headers are read by range requests.

    Args:
        dtype: the compute type.
        locate: find the stored tensor; otherwise no weight file is read, not even its header.

    Raises:
        BadInput: the model's files are damaged or not available.
    """
    model = build_transformers_model(opened.config, settings.model)
    table = model.get_input_embeddings()
    path = next(name for name, module in model.named_modules() if module is table)
    shape = tuple(table.weight.shape)
    scale = torch.tensor(embedding_scale(table, opened.config), device="cpu").to(dtype).item()
    if not locate:
        return EmbeddingTable(shape[0], scale)
    folder = local_path(settings)
    if folder is not None and folder.suffix == GGUF:
        problem = (
            f"the script reads embeddings from safetensors, and {settings.model!r} is a GGUF file; "
            "use --to llama-cpp, or --to peft"
        )
        return EmbeddingTable(shape[0], scale, problem=problem)
    headers: Mapping[str, tuple[str, tuple[int, ...]]]
    if folder is not None:
        stored = find_tensors(folder, settings.model)
        headers = {name: (tensor.type, tuple(tensor.shape)) for name, tensor in stored.items()}
    else:
        on_hub = hub.read_headers(settings)
        headers = {name: (kind, tuple(shape)) for name, (kind, shape, _) in on_hub.items()}
    own = f"{path.rpartition('.')[2]}.weight"
    tensors = [
        name
        for name, (kind, stored_shape) in headers.items()
        if (name == own or name.endswith(f".{own}")) and stored_shape == shape and kind in _FLOATS
    ]
    if len(tensors) == 1:
        return EmbeddingTable(shape[0], scale, tensors[0])
    problem = (
        f"{settings.model!r} does not store its embeddings as one table of {own!r} in float types, "
        "from which the script reads rows; use the original model as base.model, or --to peft"
    )
    return EmbeddingTable(shape[0], scale, problem=problem)
