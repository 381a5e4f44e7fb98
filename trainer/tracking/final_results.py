"""Final results of a run as MLflow shows them; ``trainer.reporting.mlflow_note`` computes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class PromptResult:
    """Final results of one prompt.

    Attributes:
        step: training step of the saved adapter.
        metrics: scores of the adapter and of its baselines, by metric name.
        tags: how training ended and whether the prompt was selected.
    """

    step: int
    metrics: Mapping[str, float]
    tags: Mapping[str, str]


@dataclass(frozen=True)
class FinalResults:
    """Final results of a run.

    Attributes:
        note: description of the parent run (Markdown).
        prompts: results by prompt name.
    """

    note: str
    prompts: Mapping[str, PromptResult]


#: Reads the final results from an output folder. The commands pass it in, because reporting is a
#: higher folder than tracking.
ReadResults = Callable[[Path], FinalResults]
