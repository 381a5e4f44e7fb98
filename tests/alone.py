"""A rank that is alone, without deepspeed: what evaluation and steps ask of an engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Alone:
    rank, world_size, is_main = 0, 1, True

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device or torch.device("cpu")

    def all_reduce_sum(self, tensors: Sequence[Tensor]) -> None: ...

    def end_step(self) -> None: ...

    def note_trained_batch(self) -> None: ...

    def any_rank(self, flag: bool) -> bool:
        return flag

    def all_gather(self, value: T) -> list[T]:
        return [value]

    def broadcast(self, value: T) -> T:
        return value
