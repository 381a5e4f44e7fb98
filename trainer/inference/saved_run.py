"""Trained prompts of a run's output folder. Imports torch only to read a prompt's tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.config import Prompt, RunConfig, Task, load_output, resolve_path
from trainer.prompts.saved_prompts import WEIGHTS
from trainer.runtime.errors import BadInput, did_you_mean
from trainer.runtime.json_file import read_json_object

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.prompts.soft_prompt import SoftPrompt

#: Folder of a run with one folder per prompt.
PROMPTS = "prompts"
#: Names that are listed in a message.
_MAX_NAMES = 20


@dataclass(frozen=True, repr=False)
class TrainedPrompt:
    """One trained prompt of a run.

    Attributes:
        task: with the template, the choices and the metric that the prompt was trained for.
        settings: of the prompt in the run file.
        scores: of the best step, such as ``validation_accuracy``; empty without ``summary.json``.
        folder: PEFT adapter.
    """

    name: str
    task: Task
    settings: Prompt
    scores: dict[str, float]
    folder: Path

    def __repr__(self) -> str:
        key = f"validation_{self.task.metric}"
        score = f", {key} {self.scores[key]:.4g}" if key in self.scores else ""
        size = f"{self.num_virtual_tokens} virtual tokens"
        return f"<prompt {self.name!r}: task {self.task.name!r}, {self.method}, {size}{score}>"

    @property
    def method(self) -> str:
        """PEFT method: ``prompt_tuning``, ``p_tuning`` or ``prefix_tuning``."""
        return self.settings.method

    @property
    def position(self) -> str:
        """Place of the virtual tokens: ``front``, ``system`` or ``user``."""
        return self.settings.position

    @property
    def placement(self) -> str:
        """As ``Prompt.placement``, which determines the tokens of the rows."""
        return self.settings.placement

    @property
    def num_virtual_tokens(self) -> int:
        return self.settings.num_virtual_tokens

    @cached_property
    def soft_prompt(self) -> SoftPrompt:
        """Virtual tokens, or keys and values, in fp32 on the CPU.

        Raises:
            BadInput: the adapter is damaged.
        """
        import torch

        from trainer.prompts.peft_adapter import load_peft

        return load_peft(self.folder).to(torch.float32)

    @property
    def tensor(self) -> Tensor:
        """The trained values: [P, H], or keys and values [P, L, 2, A, D]; raises ``BadInput``."""
        return self.soft_prompt.tensor


class PromptTable(dict[str, TrainedPrompt]):
    """Finished prompts by name; an unknown name raises ``BadInput`` with the known ones."""

    def __init__(
        self, prompts: Sequence[TrainedPrompt], folder: Path, all_names: Sequence[str]
    ) -> None:
        super().__init__((prompt.name, prompt) for prompt in prompts)
        self._folder, self._all_names = folder, all_names

    def __missing__(self, name: str) -> TrainedPrompt:
        if name in self._all_names:
            raise BadInput(
                f"{self._folder}: prompt {name!r} is not saved yet; finish the run first"
            )
        known = list(self)
        shown = ", ".join(known[:_MAX_NAMES]) + (", ..." if len(known) > _MAX_NAMES else "")
        raise BadInput(
            f"{self._folder}: has no prompt {name!r}{did_you_mean(name, known)}; known: {shown}"
        )


@dataclass(frozen=True)
class SavedRun:
    """A run whose prompts can be used.

    Attributes:
        folder: output folder.
        config: resolved run file.
        prompts: finished prompts by name, in the order of the run file.
    """

    folder: Path
    config: RunConfig
    prompts: PromptTable

    def selected(self, names: Sequence[str]) -> list[TrainedPrompt]:
        """Return the prompts with these names, all for an empty list; raises ``BadInput``."""
        if not names:
            return list(self.prompts.values())
        problems, chosen = [], []
        for name in dict.fromkeys(names):
            try:
                chosen.append(self.prompts[name])
            except BadInput as error:
                problems += error.problems
        if problems:
            raise BadInput(f"--prompt: {problem}" for problem in problems)
        return chosen

    def check_base(self) -> None:
        """Raise ``BadInput`` if the base is a path that does not exist on this machine."""
        model = self.config.base.model
        if model.startswith((".", "/", "~")) and not resolve_path(model).exists():
            raise BadInput(
                f"{self.folder / 'run.yaml'}: base.model: {model} does not exist on this machine; "
                "write the path that the model has here into this file"
            )


def open_run(folder: str | Path) -> SavedRun:
    """Open the output folder of a run, which may have been moved.

    Raises:
        BadInput: the folder is not that of a run, or no prompt is finished.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder; give the output_dir of a run")
    if not (folder / "run.yaml").is_file():
        raise BadInput(f"{folder} has no run.yaml; give the output_dir of a run")
    config = load_output(folder)
    scores = _scores(folder)
    prompts = [
        TrainedPrompt(
            prompt.name,
            config.task(prompt.task),
            prompt,
            scores.get(prompt.name, {}),
            folder / PROMPTS / prompt.name,
        )
        for prompt in config.prompts
        if (folder / PROMPTS / prompt.name / WEIGHTS).is_file()
    ]
    if not prompts:
        raise BadInput(
            f"{folder}: has no finished prompt; train the run to its end first "
            "(promptshard status shows where it is)"
        )
    return SavedRun(folder, config, PromptTable(prompts, folder, [p.name for p in config.prompts]))


def _scores(folder: Path) -> dict[str, dict[str, float]]:
    """Read the scores of every prompt from ``summary.json``; empty if it cannot be read."""
    try:
        prompts = read_json_object(folder / "summary.json")["prompts"]
        return {
            name: {
                key: float(value)
                for key, value in result.items()
                if "validation_" in key and isinstance(value, int | float)
            }
            for name, result in prompts.items()
        }
    except (BadInput, KeyError, AttributeError):
        return {}
