"""Open and check a base with the prompts of a run, then load it."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch

from trainer.config import Base, RunConfig
from trainer.data.tokenization.chat_template import read_chat_date
from trainer.distributed.deepspeed_engine import Engine, device_name
from trainer.distributed.model_loading import (
    fingerprint_base_on_all,
    load_base,
    open_base_on_all,
)
from trainer.inference.loaded_base import InferenceBase
from trainer.inference.requests import API_NAMES, GenerationRequest, RequestNames, text_request
from trainer.inference.saved_run import SavedRun, TrainedPrompt
from trainer.inference.trained_prompts import load_prompts
from trainer.model.checkpoint_files import BaseFiles
from trainer.model.layers.matmul_selection import resolve_matmul
from trainer.runtime.console import Console
from trainer.runtime.errors import BadInput
from trainer.runtime.json_file import read_json_object


def settings_of(base: Base) -> RunConfig:
    """Return the settings of a base that is used without a run: a task with plain texts."""
    return RunConfig.model_validate(
        {
            "output_dir": ".",
            "base": base.model_dump(mode="json"),
            "tasks": [
                {"name": "text", "train": "none.jsonl", "input": "{text}", "target": "{answer}"}
            ],
            "prompts": [{"name": "none", "task": "text"}],
            "training": {"steps": 1},
        }
    )


def as_trained(engine: Engine, config: RunConfig, folder: Path) -> RunConfig:
    """Replace ``base.matmul: auto`` by what it was in a run on GPUs of this name; a collective.

    Timing at load may select another product, with other scores, and takes seconds.

    Args:
        folder: output folder of the run.
    """
    if engine.device.type != "cuda" or config.base.matmul != "auto":
        return config
    device = device_name(engine.device)

    def measured() -> str | None:
        known = get_args(Base.model_fields["matmul"].annotation)
        try:
            environment = read_json_object(folder / "environment.json")
            matmul = str(environment.get("matmul"))
            if environment.get("device") != device or matmul not in known:
                return None
            return resolve_matmul(matmul, config.base.quantization, engine.device, 0)
        except BadInput:  # no such file, or a library is missing here
            return None

    matmul = engine.run_on_main(measured)
    if matmul is None:
        return config
    base = config.base.model_copy(update={"matmul": matmul})
    return config.model_copy(update={"base": base})


@dataclass(frozen=True)
class OpenedBase:
    """A base whose files are open and checked, but whose weights are not loaded.

    Attributes:
        config, run, date: as of ``InferenceBase``.
    """

    engine: Engine
    files: BaseFiles
    config: RunConfig
    run: SavedRun | None
    date: datetime.date | None

    def text_request(
        self,
        text: str,
        prompt: TrainedPrompt,
        max_new_tokens: int | None = None,
        names: RequestNames = API_NAMES,
    ) -> GenerationRequest:
        """Make a request before the weights are loaded; raises as ``requests.text_request``."""
        (values,) = load_prompts([prompt.folder], self.files, self.engine.device)
        place = prompt.placement
        return text_request(
            self.files, prompt.task, text, values, place, max_new_tokens, self.date, names
        )

    def load(self, console: Console) -> InferenceBase:
        """Load the weights; a collective."""
        loaded = load_base(*(self.engine, self.files, self.config, console), only_inference=True)
        return InferenceBase(self.engine, self.files, self.config, loaded, self.run, self.date)


def open_inference_base(
    engine: Engine,
    source: SavedRun | Base,
    console: Console,
    *,
    prompts: Sequence[TrainedPrompt] = (),
    digests: Mapping[str, str] | None = None,
) -> OpenedBase:
    """Open the files of a base on all ranks; a collective.

    Args:
        source: a run whose base is opened, or the settings of a base.
        prompts: prompts that are read and checked.
        digests: of the base that the prompts were trained for, by part, as from
            ``fingerprint_base``; None or empty: not compared.

    Raises:
        BadInput: on all ranks, if the base or a prompt is missing, damaged, or does not fit.
    """
    run: SavedRun | None = None
    if isinstance(source, SavedRun):
        engine.run_on_all(source.check_base)
        run, config = source, as_trained(engine, source.config, source.folder)
    else:
        config = settings_of(source)
    files = open_base_on_all(engine, config.base, console)
    if digests:
        parts = fingerprint_base_on_all(engine, files, console)
        different = [part for part, digest in parts.items() if digests.get(part) != digest]
        if different:
            raise BadInput(
                f"base.model: {config.base.model!r} is not the base that the prompts were trained "
                f"for: other content of {', '.join(different)}; restore that model"
            )
    engine.run_on_all(lambda: load_prompts([p.folder for p in prompts], files, torch.device("cpu")))
    date = engine.run_on_main(lambda: None if run is None else read_chat_date(run.folder))
    return OpenedBase(engine, files, config, run, date)
