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
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.checkpointing.checkpoint_names import CHECKPOINTS, newest_checkpoint
from trainer.config import Base, RunConfig, dump, load, load_shards
from trainer.inference.saved_run import PromptTable, SavedRun, TrainedPrompt, open_run
from trainer.reporting.summary import RunSummary, load_summary
from trainer.runtime import bootstrap
from trainer.runtime.console import Console
from trainer.runtime.errors import EXIT_BAD_INPUT, EXIT_DONE, BadInput
from trainer.runtime.json_file import read_json_object

if TYPE_CHECKING:
    from trainer.inference.loaded_base import InferenceBase

#: Timeout of collectives without a run.
_TIMEOUT_SECONDS = 1800
#: Of a registered model: the base that its prompt was trained for.
BASE_FILE = "base.json"
#: Beginning of the names of the base's parts in a checkpoint's identity.
_PARTS = "base.model, "

__all__ = ["BadInput", "PromptTable", "Run", "TrainedPrompt", "load_base", "load_run", "train"]


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
    from trainer.inference.opened_base import open_inference_base

    if isinstance(source, str | Path):
        source = load_shards(str(source))
    shown = os.environ.get("RANK", "0") == "0"
    console = console or Console(sys.stderr, sys.stderr, shown=shown)
    run = source if isinstance(source, SavedRun) else None
    engine = open_engine(_TIMEOUT_SECONDS if run is None else run.config.engine.timeout_seconds)
    try:
        digests = engine.run_on_main(lambda: {} if run is None else base_digests(run.folder))
        return open_inference_base(engine, source, console, digests=digests).load(console)
    except BaseException:
        close_engine(engine)
        raise


def train(
    config: str | Path | RunConfig,
    overrides: Sequence[str] = (),
    *,
    processes: int | None = 1,
    fresh: bool = False,
) -> Run:
    """Train the prompts of a run file, as ``promptshard train``, in another process.

    Output of the command is printed here. A run that was interrupted continues from its last
    checkpoint; one that has finished is only opened.

    Args:
        config: path of a run file, or its settings.
        overrides: ``KEY=VALUE`` settings in place of those of the file.
        processes: one per GPU; None: all visible GPUs, or 2 on a machine without one.
        fresh: start over; an earlier run in ``output_dir`` is moved out of the way.

    Raises:
        BadInput: with all problems of settings and data.
        RuntimeError: the training failed.
    """
    with tempfile.TemporaryDirectory(prefix="promptshard-") as folder:
        path = Path(config) if isinstance(config, str | Path) else Path(folder) / "run.yaml"
        if isinstance(config, RunConfig):
            path.write_text(dump(config), encoding="utf-8")
        output_dir = load(path, overrides).output_dir
        options = ["--fresh"] if fresh else []
        options += [] if processes is None else [f"--processes={processes}"]
        command = [*bootstrap.command("launch"), "train", *options, str(path), *overrides]
        code, problems = _run_and_print(command)
    if code == EXIT_BAD_INPUT:
        raise BadInput(problems or "promptshard train refused its input; see its output")
    if code != EXIT_DONE:
        raise RuntimeError(f"promptshard train ended with exit code {code}; see its output")
    return load_run(output_dir)


def _run_and_print(command: Sequence[str]) -> tuple[int, list[str]]:
    """Run a command and print its output; return the exit code and the errors in the output.

    Ctrl-C is passed on, so that a training saves its state.
    """
    problems = []
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                print(line, end="", flush=True)
                problems += [line.strip()] if line.startswith(("error: ", "  ")) else []
            return process.wait(), [line.removeprefix("error: ") for line in problems]
        except KeyboardInterrupt:
            process.send_signal(signal.SIGINT)
            process.wait()
            raise


def base_digests(folder: Path) -> dict[str, str]:
    """Read the digests of a run's base; empty if the folder has none.

    A run has them in its newest checkpoint, and a registered model in ``base.json``.
    """
    name = newest_checkpoint(folder)
    try:
        if name is None:
            digests = read_json_object(folder / BASE_FILE)["digests"]
        else:
            digests = read_json_object(folder / CHECKPOINTS / name / "state.json")["identity"]
        return {key: str(value) for key, value in digests.items() if key.startswith(_PARTS)}
    except (BadInput, KeyError, AttributeError):
        return {}
