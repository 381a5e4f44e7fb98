"""Checks the memory of each step, and lowers the token budget if it exceeds the estimate."""

from __future__ import annotations

from trainer.distributed.deepspeed_engine import Engine
from trainer.packing.activation_memory import TokenBudget
from trainer.runtime.console import Console
from trainer.training.saved_tensors import SavedBytes
from trainer.training.step import StepResult


class MemoryMonitor:
    """Adjusts the token budget to the memory that steps use, equally on all ranks.

    Attributes:
        saved_bytes_per_token: of the first packed batch, between its forward and its backward.
        saved: counts the bytes that the first packed batch saves; None after the first step.
    """

    def __init__(self, engine: Engine, budget: TokenBudget, console: Console) -> None:
        self._engine, self._budget, self._console = engine, budget, console
        self.saved_bytes_per_token = 0.0
        self.saved: SavedBytes | None = SavedBytes()

    def start_step(self) -> None:
        """Start to measure the peak memory of a step."""
        self._engine.reset_peak_memory()

    def end_step(self, step: int, result: StepResult) -> None:
        """Lower the budget if a packed batch was split, or a ramp step exceeded the estimate."""
        saved_bytes = 0
        if self.saved is not None:
            saved_bytes = self.saved.total
            self.saved_bytes_per_token = saved_bytes / max(1, result.first_batch)
            self.saved = None
        budget = self._budget
        if result.splits:
            budget.halve()
            self._console.warn(
                f"step {step}: {result.splits} packed batch(es) did not fit and were split; packed "
                f"batches have up to {budget.tokens:,} tokens from now on"
            )
        elif budget.ramp:
            peak = max(self._engine.peak_activation_bytes(), saved_bytes)
            peaks = self._engine.all_gather((peak, max(1, result.longest_batch)))
            if budget.confirm(*max(peaks, key=lambda pair: pair[0] / pair[1])):
                self._console.print(f"took more than foreseen: {budget.description}")
