"""Load a base model or one rank's shard without a process group, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from trainer.config import Base
from trainer.model.checkpoint_files import open_base
from trainer.model.layers.embedding import RowExchange
from trainer.model.meta_model import build_meta_model
from trainer.model.prompted_model import PromptedBase
from trainer.model.shard_loading import LoadStats, load_shards
from trainer.runtime.errors import BadInput

CPU = torch.device("cpu")


@dataclass
class LocalSharder:
    """A ``Sharder`` without communication: allocates the shards of rank ``rank`` of ``ranks``."""

    rank: int = 0
    ranks: int = 1
    device: torch.device = CPU
    shards: list[Tensor] = field(default_factory=list)
    scales: list[Tensor] = field(default_factory=list)
    exchange: RowExchange | None = None

    def bounds(self, num_elements: int, unit: int = 1) -> tuple[int, int]:
        size = self._size(num_elements, unit)
        start = min(self.rank * size, num_elements)
        return start, min(start + size, num_elements)

    def allocate(self, num_elements: int, dtype: torch.dtype, unit: int = 1) -> Tensor:
        return torch.zeros(self._size(num_elements, unit), dtype=dtype, device=self.device)

    def _size(self, num_elements: int, unit: int) -> int:
        return -(-num_elements // (self.ranks * unit)) * unit

    def adopt(self, parameter: nn.Parameter, shard: Tensor) -> None:
        self.shards.append(shard)
        if self.ranks == 1:
            full = nn.Parameter(shard.view(parameter.shape), requires_grad=False)
            torch.utils.swap_tensors(parameter, full)

    def finish(self, scales: Sequence[Tensor], problems: Sequence[str]) -> None:
        self.scales = list(scales)
        if problems:
            raise BadInput(problems)


def load_unsharded(
    folder: Path,
    quantization: str,
    checkpointing: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
) -> PromptedBase:
    """Load a complete base model."""
    settings = Base.model_validate({"model": str(folder), "quantization": quantization})
    files = open_base(settings)
    skeleton = build_meta_model(files, settings, dtype, device)
    base, _ = load_shards(
        skeleton,
        files,
        dtype=dtype,
        device=device,
        sharder=LocalSharder(device=device),
        checkpointing=checkpointing,
    )
    return base


def load_shard(
    folder: Path, rank: int = 0, ranks: int = 1, **settings: str
) -> tuple[PromptedBase, LocalSharder, LoadStats]:
    """Load the shard that rank ``rank`` of ``ranks`` holds of a base model."""
    files = open_base(Base.model_validate({"model": str(folder), **settings}))
    skeleton = build_meta_model(
        files, Base.model_validate({"model": str(folder), **settings}), torch.float32, CPU
    )
    one = LocalSharder(rank, ranks)
    base, stats = load_shards(
        skeleton, files, dtype=torch.float32, device=CPU, sharder=one, checkpointing=False
    )
    return base, one, stats
