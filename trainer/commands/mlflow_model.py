"""Load a registered prompt for MLflow: ``mlflow models predict -m models:/NAME@best``.

MLflow imports this module by its name in the ``MLmodel`` file and calls ``_load_pyfunc``. The base
is loaded from its own folder or the hub, and must be the one that the prompt was trained for.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.api import load_base, load_run

if TYPE_CHECKING:
    from trainer.api import Run


class PromptModel:
    """Predicts rows with one prompt. The base is loaded by the first call and kept."""

    def __init__(self, run: Run) -> None:
        self._run = run
        (self._prompt,) = run.prompts.values()
        self._base: Any = None

    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> Any:
        """Return a data frame with a prediction per row.

        Args:
            model_input: data frame with the columns of the task.
        """
        if self._base is None:
            self._base = load_base(self._run)
        rows = model_input.to_dict("records")
        predictions = self._base.score(rows, self._prompt, use_targets=False)
        columns = ["prediction", "log_probability"]
        columns += ["probabilities"] if self._prompt.task.choices else []
        records = [{name: getattr(made, name) for name in columns} for made in predictions]
        return type(model_input)(records, columns=columns)


def _load_pyfunc(data_path: str) -> PromptModel:
    return PromptModel(load_run(Path(data_path)))
