"""The fake engine of all tests: a single rank without DeepSpeed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from trainer.distributed.collectives import Ranks

T = TypeVar("T")


class OneRank(Ranks):
    """The trainer's own ``Ranks`` with collectives over one rank.

    Attributes:
        reduced: number of elements of each ``all_reduce_sum``.
    """

    def __init__(
        self,
        device: torch.device | None = None,
        *,
        rank: int = 0,
        world_size: int = 1,
        local_rank: int = 0,
    ) -> None:
        super().__init__(rank, world_size, local_rank, device or torch.device("cpu"), 60)
        self.gathered_bytes = self.exchanged_bytes = 0
        self.reduced: list[int] = []

    def all_reduce_sum(self, tensors: Sequence[Tensor]) -> None:
        self.reduced.append(sum(tensor.numel() for tensor in tensors))

    def any_rank(self, flag: bool) -> bool:
        return flag

    def all_gather(self, value: T) -> list[T]:
        return [value]

    def broadcast(self, value: T | None) -> T:
        return value  # type: ignore[return-value]

    # What the engine adds to Ranks.

    def end_step(self) -> None: ...

    def note_trained_batch(self) -> None: ...

    def reset_peak_memory(self) -> None: ...

    def peak_activation_bytes(self) -> int:
        return 0
