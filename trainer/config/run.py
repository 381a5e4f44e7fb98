"""Load, check and write the run file."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, field_validator, model_validator

from trainer.config import sweep, yaml_parser, yaml_source
from trainer.config.base import Base, EngineConfig
from trainer.config.explain import explain
from trainer.config.prompt import Prompt
from trainer.config.task import Task, split_template
from trainer.config.tracking import Tracking
from trainer.config.training import Checkpoint, Evaluation, Search, Training
from trainer.config.types import PathText, Section, checked
from trainer.runtime.errors import BadInput, did_you_mean

PROJECT_ROOT = Path(__file__).resolve().parents[2]
_IN_WHEEL = Path(__file__).resolve().parents[1] / "shipped"
#: Folder with the shipped ``ds_configs`` and ``examples``; ``setup.py`` puts them into the wheel.
SHIPPED = _IN_WHEEL if _IN_WHEEL.is_dir() else PROJECT_ROOT

#: Ids as in the hub's list (https://huggingface.co/docs/hub/repositories-licenses).
LICENSE_ID = re.compile(r"[a-z0-9][a-z0-9.+_-]{0,63}")
#: Settings that are not supported yet, each with a remedy.
NOT_YET_KEYS = {
    "base.trust_remote_code": "models that need custom code are refused",
}


class RunConfig(Section):
    """The run file."""

    output_dir: PathText = Field(
        description="output folder of the run\n"
        "~ and $NAME are expanded in every path of the file; paths are relative to the working "
        "directory."
    )
    license: str | None = Field(
        None,
        description="license of the trained prompts, in their model cards\n"
        "An id of the Hugging Face hub, such as apache-2.0, mit or cc-by-4.0.\n"
        "null: that of the base, if its model card or GGUF file states one",
    )
    base: Base = Field(description="the frozen pretrained model")
    engine: EngineConfig = Field(
        default_factory=EngineConfig,
        description="sharding, recomputation and attention of the base model",
    )
    tasks: Annotated[list[Task], Field(min_length=1)] = Field(
        description="what prompts learn: data, template and metric of each task"
    )
    prompts: Annotated[list[Prompt], Field(min_length=1)] = Field(
        description="what is trained: prompts, each for one task"
    )
    training: Training = Field(description="length of the training and size of a step")
    evaluation: Evaluation = Field(
        default_factory=Evaluation, description="validation during training, and early stopping"
    )
    search: Search = Field(
        default_factory=Search,
        description="limits of a sweep and of the search for initial prompts",
    )
    checkpoint: Checkpoint = Field(
        default_factory=Checkpoint, description="checkpoints, from which a stopped run resumes"
    )
    tracking: Tracking = Field(
        default_factory=Tracking, description="metrics in MLflow and TensorBoard"
    )

    @field_validator("output_dir")
    @classmethod
    def _folder(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("is empty; name a folder")
        return str(Path(value))

    @field_validator("license")
    @classmethod
    def _license_id(cls, value: str | None) -> str | None:
        if value is None or LICENSE_ID.fullmatch(value.lower()):
            return value and value.lower()
        raise ValueError(
            f"{value[:60]!r} is not an id of the hub's list of licenses; use one such as "
            "apache-2.0, mit, cc-by-4.0 or other"
        )

    @field_validator("tasks", "prompts")
    @classmethod
    def _unique_names(cls, items: list[Any]) -> list[Any]:
        names = [item.name for item in items]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"names must be unique; used more than once: {', '.join(twice)}")
        return items

    @model_validator(mode="after")
    def _known_tasks(self) -> RunConfig:
        names = [task.name for task in self.tasks]
        problems = [
            f"prompts[{i}].task: {prompt.task!r} is not a task of this file; "
            f"known: {', '.join(names)}{did_you_mean(prompt.task, names)}"
            for i, prompt in enumerate(self.prompts)
            if prompt.task not in names
        ]
        problems += self._problems_of_teachers()
        problems += self._problems_of_positions()
        choices = {task.name: task.choices for task in self.tasks}
        problems += [
            f"prompts[{i}].init.labels: task {prompt.task!r} has no choices; list them, or "
            "use init: {text: ...} or vocab"
            for i, prompt in enumerate(self.prompts)
            if prompt.init.labels and prompt.task in choices and not choices[prompt.task]
        ]
        first: dict[str, Prompt] = {}
        for i, prompt in enumerate(self.prompts):
            if prompt.share is not None:
                other = first.setdefault(prompt.share, prompt)
                problems += [
                    f"prompts[{i}].{key}: differs from that of {other.name!r}, but both train the "
                    f"encoder of share {prompt.share!r}; use the same value, or another share"
                    for key in prompt.differences(other)
                ]
        without = [task.name for task in self.tasks if not task.has_validation]
        for setting, given in (
            ("evaluation.early_stopping", self.evaluation.early_stopping),
            ("search.halving", self.search.halving),
        ):
            if given and without:
                problems.append(
                    f"{setting}: task {without[0]!r} has no validation rows; set validation or "
                    f"validation_share, or remove {setting.partition('.')[2]}"
                )
        if not problems:
            self._place_prompts_at_front()
        return checked(self, [*problems, *self._search_problems()])

    def _place_prompts_at_front(self) -> None:
        """Replace ``position: auto`` where it does not depend on the chat template."""
        for i, prompt in enumerate(self.prompts):
            task = self.task(prompt.task)
            inside = task.is_chat and split_template(task.input) is None
            if prompt.entry.trains_prefix:  # the text before the place has to be equal in all rows
                inside &= task.messages is None and prompt.objective != "distill"
            if prompt.position == "auto" and not inside:
                self.prompts[i] = prompt.model_copy(update={"position": "front"})

    def _search_problems(self) -> Iterator[str]:
        most, halving = self.search.max_prompts, self.search.halving
        profile = self.engine.profile
        if profile and profile.first > self.last_step:
            yield (
                f"engine.profile.first: {profile.first} is after the last step ({self.last_step}), "
                "so nothing would be recorded; lower it"
            )
        if len(self.prompts) > most:
            yield (
                f"prompts: {len(self.prompts)}, but search.max_prompts is {most}; raise it, or "
                "split the run"
            )
        if halving and halving.first >= self.last_step:
            yield (
                f"search.halving.first: {halving.first} is not before the last step "
                f"({self.last_step}), so no prompt would be stopped; lower it"
            )

    @property
    def notes(self) -> list[str]:
        """Settings without effect in this run."""
        rivals = Counter((prompt.task, prompt.teacher) for prompt in self.prompts)
        if self.search.halving is None or max(rivals.values(), default=2) > 1:
            return []
        group = "task and teacher" if any(teacher for _, teacher in rivals) else "task"
        return [
            "search.halving: stops no prompt, because it compares the prompts of a "
            f"{group}, and each {group} has only one; add prompts, or remove halving"
        ]

    def _problems_of_positions(self) -> list[str]:
        problems = []
        tasks = {task.name: task for task in self.tasks}
        for i, prompt in enumerate(self.prompts):
            task = tasks.get(prompt.task)
            if task is None or prompt.position in ("auto", "front"):
                continue
            if not task.is_chat:
                problems.append(
                    f"prompts[{i}].position: {prompt.position} needs a dialogue; set chat: true or "
                    f"messages in task {task.name!r}, or write {{virtual_tokens}} into its input"
                )
            elif split_template(task.input) is not None:
                problems.append(
                    f"prompts[{i}].position: the input of task {task.name!r} already has "
                    "{virtual_tokens}; remove one"
                )
        return problems

    def _problems_of_teachers(self) -> list[str]:
        problems = []
        for i, task in enumerate(self.tasks):
            prompts = [prompt for prompt in self.prompts if prompt.task == task.name]
            labelled = [p.name for p in prompts if p.objective != "distill"]
            written = task.messages is None and task.tokens is None
            if written and not task.target and (labelled or not prompts):
                problems.append(
                    f"tasks[{i}].target: is missing; add it"
                    + (f", or use objective: distill for {', '.join(labelled)}" if labelled else "")
                )
            if task.tokens is not None and len(labelled) < len(prompts):
                problems.append(
                    f"tasks[{i}].tokens: objective: distill needs text; use input or messages"
                )
        return problems

    def task(self, name: str) -> Task:
        return next(task for task in self.tasks if task.name == name)

    def prompt_seed(self, prompt: Prompt) -> int:
        return self.training.seed if prompt.seed is None else prompt.seed

    def data_seed(self, prompt: Prompt) -> int:
        """Seed of the order of a prompt's rows."""
        return self.prompt_seed(prompt) if prompt.data_seed is None else prompt.data_seed

    def prompt_steps(self, prompt: Prompt) -> int:
        return self.training.steps if prompt.steps is None else prompt.steps

    def init_budget(self, prompt: Prompt) -> int:
        """Maximum number of candidates that ``init: auto`` and ``init: search`` score.

        Scoring a candidate is a forward over the rows of one update. It costs half of the update's
        FLOPs, because a frozen base has no weight gradients.
        """
        return int(2 * self.search.init_share * self.prompt_steps(prompt))

    def init_texts(self, prompt: Prompt) -> list[str]:
        """Return the texts that ``init: auto`` compares; without any, it searches."""
        task = self.task(prompt.task)
        if prompt.init.search or not prompt.init.auto:
            return []
        return list(task.hand_written) or ([task.system] if task.system else [])

    @property
    def last_step(self) -> int:
        """The last step of the prompt that trains longest."""
        return max(self.prompt_steps(prompt) for prompt in self.prompts)


def resolve_path(path: str) -> Path:
    """Resolve a path relative to the working directory or, if missing there, the shipped files."""
    here = os.path.expanduser(path)
    shipped = SHIPPED / path
    return shipped if not os.path.exists(here) and os.path.exists(shipped) else Path(here)


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run file, apply overrides, expand sweeps and check the settings.

    Raises:
        BadInput: with every problem, as ``FILE:LINE: setting: problem; remedy``, or
            ``override 'key=value': setting: ...`` if the value is from the command line.
    """
    expansion = sweep.expand(yaml_source.read(Path(path), overrides))
    problems = expansion.problems
    try:
        config = RunConfig.model_validate(expansion.source.data)
    except ValidationError as error:
        explained = explain(error, expansion.source, RunConfig, NOT_YET_KEYS)
        problems = [*problems, *explained]
    if not problems:
        problems = list(_repeated(config, expansion))
    if problems:
        raise BadInput(problems)
    return config


def _repeated(config: RunConfig, expansion: sweep.Expansion) -> Iterator[str]:
    """Yield the sweeps that make a prompt twice, from equal values such as 1e-3 and "0.001"."""
    indices = {prompt.name: i for i, prompt in enumerate(config.prompts)}
    for names in expansion.names.values():
        first: dict[str, str] = {}
        for name in names:
            prompt = config.prompts[indices[name]]
            settings = prompt.model_dump(mode="json", exclude={"name"}) | {
                "seed": config.prompt_seed(prompt),
                "data_seed": config.data_seed(prompt),
                "steps": config.prompt_steps(prompt),
            }
            other = first.setdefault(json.dumps(settings, sort_keys=True), name)
            if other != name:
                path = (*expansion.source.written(("prompts", indices[name])), "sweep")
                yield (
                    f"{expansion.source.where(path)}: {yaml_source.dotted(path)}: makes the same "
                    f"prompt twice, {other!r} and {name!r}; remove one of two equal values"
                )
                break


def sweeps(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, list[str]]:
    """Return the prompts that each sweep of a valid run file expands to, by the sweep's prompt."""
    return sweep.expand(yaml_source.read(Path(path), overrides)).names


def load_output(folder: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Load the run file in a run's output folder, which may have been moved; raises as ``load``."""
    config = load(Path(folder) / "run.yaml", [*overrides, "output_dir=."])
    return config.model_copy(update={"output_dir": str(Path(folder))})


class _BaseAlone(Section):
    base: Base


def load_shards(model: str, overrides: Sequence[str] = ()) -> Base:
    """Return the settings of a base without a run file: defaults and ``base.*`` overrides.

    Raises as ``load``.
    """
    source = yaml_source.override(
        yaml_source.YamlSource(model, {"base": {"model": model}}, {}), overrides
    )
    try:
        return _BaseAlone.model_validate(source.data).base
    except ValidationError as error:
        raise BadInput(explain(error, source, _BaseAlone, NOT_YET_KEYS)) from None


def dump(config: RunConfig) -> str:
    """Format the resolved run file as YAML, with every default."""
    return yaml_parser.dump(config.model_dump(mode="json"))
