"""The Python API: open a run, load its base, generate, score and train.

    from trainer.api import load_base, load_run, train

    run = load_run("runs/quickstart")
    with load_base(run) as base:
        base.generate("Chest pain.", prompt="triage")

One process is enough; in ranks that the launcher started, the same calls are collectives. Nothing
is downloaded for a base that is a local folder, and MLflow is needed only by ``train``. Invalid
input raises ``BadInput``, a ``ValueError`` with one line per problem. Torch is imported by the
first call that needs it.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.checkpointing.checkpoint_names import CHECKPOINTS, newest_checkpoint
from trainer.config import Base, load_shards
from trainer.inference.saved_run import PromptTable, SavedRun, TrainedPrompt, open_run
from trainer.reporting.summary import RunSummary, load_summary
from trainer.runtime.console import Console
from trainer.runtime.errors import BadInput
from trainer.runtime.json_file import read_json_object

if TYPE_CHECKING:
    from trainer.inference.loaded_base import InferenceBase

#: Timeout of collectives without a run.
_TIMEOUT_SECONDS = 1800
#: Beginning of the names of the base's parts in a checkpoint's identity.
_PARTS = "base.model, "

__all__ = ["BadInput", "PromptTable", "Run", "TrainedPrompt", "load_base", "load_run"]


@dataclass(frozen=True)
class Run(SavedRun):
    """A run with finished prompts; see ``SavedRun`` for its fields."""

    @cached_property
    def summary(self) -> RunSummary | None:
        """Results of ``summary.json``; None if the run has not written them yet."""
        return load_summary(self.folder)


def load_run(path: str | Path) -> Run:
    """Open the output folder of a run, which may have been moved.

    Raises:
        BadInput: the folder is not that of a run, or no prompt is finished.
    """
    return Run(**vars(open_run(path)))


def load_base(
    source: SavedRun | Base | str | Path, *, console: Console | None = None
) -> InferenceBase:
    """Load a base once, for any number of calls; close it, or use it in a ``with`` statement.

    Args:
        source: a run, whose prompts can then be named; or a model: settings of ``base`` in a run
            file, a folder, a GGUF file or a hub id.
        console: shows progress; default: stderr, on rank 0.

    Raises:
        BadInput: the model is missing, damaged or not supported, or it is not the one that the
            run's prompts were trained for.
    """
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # before the import of deepspeed
    from trainer.inference.engine import close_engine, open_engine
    from trainer.inference.loaded_base import load_inference_base

    if isinstance(source, str | Path):
        source = load_shards(str(source))
    shown = os.environ.get("RANK", "0") == "0"
    console = console or Console(sys.stderr, sys.stderr, shown=shown)
    run = source if isinstance(source, SavedRun) else None
    engine = open_engine(_TIMEOUT_SECONDS if run is None else run.config.engine.timeout_seconds)
    try:
        digests = engine.run_on_main(lambda: {} if run is None else _digests(run.folder))
        return load_inference_base(engine, source, console, digests=digests)
    except BaseException:
        close_engine(engine)
        raise


def _digests(folder: Path) -> dict[str, str]:
    """Read the digests of a run's base from its newest checkpoint; empty if there is none."""
    name = newest_checkpoint(folder)
    try:
        state = read_json_object(folder / CHECKPOINTS / str(name) / "state.json")
        identity = state["identity"]
        return {key: str(value) for key, value in identity.items() if key.startswith(_PARTS)}
    except (BadInput, KeyError, AttributeError):
        return {}
