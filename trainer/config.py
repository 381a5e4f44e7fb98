"""The run file: strict, typed, every mistake reported at once. Imports no torch.

One class per section, in the order of the file. Field names follow PEFT and transformers where they
have one. ``load`` reads a file and its ``key=value`` overrides; ``BadInput`` carries every problem
with the line, the setting, its value and the remedy.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from trainer import runfile
from trainer.errors import BadInput, did_you_mean

PROJECT_ROOT = Path(__file__).resolve().parent.parent

#: Metrics for which less is better.
LOWER_IS_BETTER = frozenset({"loss"})


def _no_bool(value: Any) -> Any:
    """In Python true is 1; in a run file it is a mistake."""
    if isinstance(value, bool):
        raise ValueError(f"{str(value).lower()} is not a number")
    return value


_Number = BeforeValidator(_no_bool)
PositiveInt = Annotated[int, _Number, Field(gt=0)]
NonNegativeInt = Annotated[int, _Number, Field(ge=0)]
PositiveFloat = Annotated[float, _Number, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, _Number, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, _Number, Field(ge=0, le=1, allow_inf_nan=False)]
# A name becomes a folder and a metric's prefix: letters, digits, '.', '_' and '-'.
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80)]

#: Settings that DESIGN fixes but this version does not run yet: (setting, value) -> what to use.
NOT_YET = {
    ("encoder", "lstm"): "use mlp",
    ("encoder", "residual"): "use mlp",
}
NOT_YET_KEYS = {
    "base.trust_remote_code": "models that need code of their own are refused",
    "prompts.sweep": "write one prompt per combination",
    "prompts.init.labels": "use init: {text: ...} with the labels in the text",
    "prompts.init.from": "use init: {text: ...}, {vocab: true} or {random: true}",
}


class Section(BaseModel):
    """A part of the run file: unknown keys are refused, values never change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


SectionT = TypeVar("SectionT", bound=Section)


def _checked(section: SectionT, problems: Sequence[str]) -> SectionT:
    """A section, unless a check across its settings found problems: one ``setting: text`` each."""
    if problems:
        raise ValueError("\n".join(problems))
    return section


class Base(Section):
    """The frozen pretrained model."""

    model: str = Field(description="folder or hub id")
    revision: str | None = Field(None, description="branch, tag or commit of a hub id")
    quantization: Literal["int8", "none"] = Field("int8", description="how weights are stored")
    embeddings: Literal["keep", "int8"] = Field(
        "keep", description="how word embeddings are stored; keep: in the checkpoint's type"
    )
    head: Literal["keep", "int8"] = Field(
        "keep", description="the same for the head; where it is the embedding table, both are one"
    )
    matmul: Literal["auto", "int8", "int8_outliers", "dequantize"] = Field(
        "auto",
        description="int8: activations are quantised too; int8_outliers: all but the largest; "
        "dequantize: exact to the stored weights; auto: int8 where that was measured to be faster",
    )
    outlier_threshold: PositiveFloat = Field(
        6.0, description="matmul int8_outliers: activations beyond this are not quantised"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="compute type; auto: bfloat16 on GPUs that have it, float32 on CPU"
    )

    @model_validator(mode="after")
    def _check(self) -> Base:
        problems = []
        if self.outlier_threshold != 6.0 and self.matmul != "int8_outliers":
            problems.append(
                f"outlier_threshold: matmul {self.matmul} knows no outliers; use matmul: "
                "int8_outliers, or remove it"
            )
        return _checked(self, problems)


class Engine(Section):
    """How the base is sharded and recomputed."""

    deepspeed: str = Field("ds_configs/zero3.json", description="DeepSpeed policy (JSON)")
    gradient_checkpointing: Literal["auto"] | bool = Field(
        "auto",
        description="recompute activations in backward; auto: where they would not fit otherwise",
    )
    attention: Literal["auto", "sdpa", "flex"] = Field(
        "auto",
        description="of the packed rows; flex: one FlexAttention kernel, on a GPU only; sdpa: rows "
        "of similar length side by side; auto: sdpa, as flex has not been measured to be faster",
    )
    shard_group: Literal["auto", "world", "node"] | int = Field(
        "world",
        description="ranks that hold one copy of the base together: all, those of a node, a "
        "number, or auto: as few as base_memory allows",
    )
    base_memory: str = Field(
        "auto",
        description="memory of a rank for the base, as 24GB: its shard, the layers at work, and "
        "gathered layers that stay until the step ends; auto: half of what is free",
    )
    timeout_seconds: PositiveInt = Field(1800, description="longest wait for another rank")

    @field_validator("shard_group", mode="before")
    @classmethod
    def _check_group(cls, value: Any) -> Any:
        number = isinstance(value, int) and not isinstance(value, bool) and value > 0
        if value not in ("auto", "world", "node") and not number:
            raise ValueError(f"{value!r} is not one of auto, world, node or a number of ranks")
        return value

    @field_validator("base_memory", mode="before")
    @classmethod
    def _check_memory(cls, value: Any) -> Any:
        if value != "auto":
            parse_bytes(value)
        return value


class DataSource(Section):
    """Where rows come from: files, a folder of ``Dataset.save_to_disk``, or a hub data set."""

    path: str | None = Field(
        None, description="a file, a glob such as data/*.jsonl, or a folder of save_to_disk"
    )
    hub: str | None = Field(None, description="id of a data set of the Hugging Face hub")
    name: str | None = Field(None, description="configuration of a hub data set")
    split: str | None = Field(
        None, description="split of a hub data set or saved folder; default: that of the setting"
    )
    revision: str | None = Field(None, description="branch, tag or commit of a hub data set")
    weight: PositiveFloat | None = Field(
        None,
        description="share of the rows of an epoch, beside the other sources' weights; an epoch "
        "has as many rows as all sources together, so a large weight repeats a small source; "
        "null, for all sources alike: every row once",
    )
    max_rows: PositiveInt | None = Field(
        None, description="most rows of this source, chosen by a hash of their content"
    )

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        """``hf://NAME`` stands for ``{hub: NAME}``, any other text for ``{path: TEXT}``."""
        if not isinstance(value, str):
            return value
        return {"hub": value[5:]} if value.startswith("hf://") else {"path": value}

    @model_validator(mode="after")
    def _check(self) -> DataSource:
        if (self.path is None) == (self.hub is None):
            raise ValueError("give either path or hub")
        alone = [key for key in ("name", "revision") if getattr(self, key) and self.hub is None]
        return _checked(self, [f"{key}: only a hub data set has one" for key in alone])

    @property
    def label(self) -> str:
        """The source as messages name it."""
        if self.path is not None:
            return self.path
        return f"hf://{self.hub}" + (f"/{self.name}" if self.name else "")


def _listed(value: Any) -> Any:
    """One source or a list of them: always a list."""
    return value if value is None or isinstance(value, list) else [value]


Sources = Annotated[list[DataSource], BeforeValidator(_listed), Field(min_length=1)]
#: Share of the train rows that is kept for validation where no rows are named for it.
DEFAULT_VALIDATION_SHARE = 0.1


class TokenColumns(Section):
    """Columns of rows that are token ids already."""

    input_ids: str = Field("input_ids", min_length=1, description="column of the token ids")
    labels: str = Field(
        "labels", min_length=1, description="column of the labels: the id itself, or -100 for none"
    )


class Task(Section):
    """Rows + template + metric."""

    name: Name
    train: Sources = Field(
        description="one or a list of: a jsonl, json, csv, tsv, txt, parquet or arrow file, a "
        "glob, a folder of save_to_disk, hf://NAME, or a mapping with weight and max_rows"
    )
    validation: Sources | None = Field(
        None, description="rows never trained on; null: validation_share of the train rows"
    )
    shifted_validation: Sources | None = Field(
        None, description="rows that ask the same in another context: shows overfitting"
    )
    validation_share: Annotated[float, _Number, Field(ge=0, lt=1)] | None = Field(
        None,
        description="share of the train rows kept for validation, chosen by a hash of their "
        "content: equal rows stay together, and new rows move none; null: 0.1; 0: no validation",
    )
    max_rows: PositiveInt | None = Field(
        None,
        description="most train rows; those with the smallest hash of their content, so that "
        "fewer are always among more and neither depends on the order of the file",
    )
    max_validation_rows: PositiveInt | None = Field(
        None, description="the same for validation and for shifted_validation"
    )
    input: str = Field("", description="template with {column} fields: what the base reads")
    target: str = Field("", description="template with {column} fields: what it should write")
    messages: str | None = Field(
        None,
        description="in place of input and target: the column that holds a dialogue, a list of "
        "{role, content}; written by the tokenizer's chat template, the assistant's turns learnt",
    )
    tokens: TokenColumns | None = Field(
        None, description="in place of input and target: columns of token ids and labels"
    )
    choices: list[str] | None = Field(
        None, description="values of the target's one column, scored by their likelihood"
    )
    multi_label: bool = Field(
        False, description="the target's column holds a list of choices; scored by generating"
    )
    label_separator: str = Field(
        ", ", min_length=1, description="multi_label: stands between the labels of a row"
    )
    metric: Literal["accuracy", "exact_match", "f1", "execution", "loss"] = Field(
        "loss", description="higher is better, but for loss"
    )
    tests: str = Field(
        "tests", description="metric execution: the column that holds the test calls"
    )
    append_eos: bool = Field(True, description="train the base to stop after the target")
    too_long: Literal["refuse", "skip", "truncate"] = Field(
        "refuse", description="a row longer than the context; truncate cuts the input from the left"
    )
    max_new_tokens: PositiveInt = Field(64, description="length limit where the metric generates")
    hand_written: list[str] = Field(
        default_factory=list, description="hard prompts to compare with, put in front of the input"
    )

    @field_validator("choices", mode="before")
    @classmethod
    def _as_text(cls, choices: Any) -> Any:
        """Rows are compared as text, so ``[0, 1]`` is as good as ``["0", "1"]``."""
        if not isinstance(choices, list):
            return choices
        if any(isinstance(choice, bool) for choice in choices):
            raise ValueError('YAML reads a bare yes, no, on or off as true or false; write "yes"')
        return [str(c) if isinstance(c, int | float) else c for c in choices]

    @property
    def has_validation(self) -> bool:
        return self.validation is not None or self.kept_share > 0

    @property
    def kept_share(self) -> float:
        """Share of the train rows that become validation rows."""
        if self.validation is not None:
            return 0.0
        share = self.validation_share
        return DEFAULT_VALIDATION_SHARE if share is None else share

    @property
    def scored_by_likelihood(self) -> bool:
        """Every choice is scored on every row; else the row's own target alone."""
        return self.choices is not None and not self.multi_label

    @model_validator(mode="after")
    def _check(self) -> Task:
        problems = [*self._problems_of_form(), *self._problems_of_choices()]
        for name in ("train", "validation", "shifted_validation"):
            sources = getattr(self, name) or []
            weights = [source.weight for source in sources]
            if any(weights) and None in weights:
                problems.append(
                    f"{name}[{weights.index(None)}].weight: is missing; give every source of "
                    f"{name} a weight, or none"
                )
            if any(weights) and name != "train":
                problems.append(f"{name}: weights mix train rows; validation reads all rows once")
        if self.validation is not None and self.validation_share is not None:
            problems.append("validation_share: validation names its rows already; remove one")
        if not self.has_validation:
            for name in ("shifted_validation", "hand_written"):
                if getattr(self, name):
                    problems.append(
                        f"{name}: needs validation too; name rows to score, or give "
                        "validation_share"
                    )
        if self.tests != "tests" and self.metric != "execution":
            problems.append(f"tests: metric {self.metric} runs none; use metric: execution")
        return _checked(self, problems)

    def _problems_of_form(self) -> list[str]:
        """Exactly one of: input and target, messages, tokens."""
        other = [name for name in ("messages", "tokens") if getattr(self, name) is not None]
        if not other:
            problems = [
                f"{name}: is missing; add it"
                for name in ("input", "target")
                if not getattr(self, name)
            ]
            if self.input and not template_fields(self.input):
                problems.append("input: has no {column} field, so every row would read the same")
            return problems
        allowed = ("loss", "exact_match") if other[0] == "messages" else ("loss",)
        clash = [*other[1:], *(n for n in ("input", "target") if getattr(self, n))]
        problems = [f"{name}: rows come from {other[0]}; remove one" for name in clash]
        problems += [
            f"{name}: needs input and target; rows come from {other[0]}"
            for name in ("choices", "hand_written")
            if getattr(self, name)
        ]
        if self.metric not in allowed:
            problems.append(
                f"metric: {self.metric!r} needs input and target; with {other[0]} use "
                f"{' or '.join(allowed)}"
            )
        return problems

    def _problems_of_choices(self) -> list[str]:
        problems = []
        if self.metric == "accuracy" and not self.choices:
            problems.append(
                "choices: metric accuracy needs them; list the labels, or use exact_match"
            )
        if self.choices is not None:
            fields = template_fields(self.target)
            if len(fields) != 1:
                problems.append(
                    "choices: target must have exactly one {column} field to put them in, "
                    f"found {len(fields)}: {self.target!r}"
                )
            if len(self.choices) < 2 or len(set(self.choices)) != len(self.choices):
                problems.append(f"choices: {self.choices} needs at least two values, all different")
        if self.multi_label:
            problems += self._problems_of_labels()
        elif self.metric == "f1":
            problems.append("metric: f1 compares sets of labels; add multi_label: true")
        return problems

    def _problems_of_labels(self) -> list[str]:
        if self.choices is None:
            return ["choices: multi_label needs them; list the labels"]
        mark = self.label_separator.strip() or self.label_separator
        inside = [choice for choice in self.choices if mark in choice]
        problems = [
            f"label_separator: {self.label_separator!r} stands in the choice {choice!r} too; "
            "use another"
            for choice in inside[:1]
        ]
        if self.metric not in ("f1", "exact_match", "loss"):
            problems.append(f"metric: {self.metric!r} takes one label; use f1 or exact_match")
        return problems


class Init(Section):
    """Where the virtual tokens start, or, in p_tuning, the input of the encoder that makes them.

    In prefix_tuning: the keys and values that the base makes of the text or of the drawn words; a
    text is repeated or cut to num_virtual_tokens. Exactly one of the fields is given.
    """

    text: str | None = Field(
        None, min_length=1, description="word embeddings of this text, repeated"
    )
    vocab: bool = Field(False, description="embeddings of tokens drawn from the vocabulary")
    random: bool = Field(
        False,
        description="normal noise with the root mean square of the embeddings, or keys and values",
    )
    zero: bool = Field(False, description="zeros, for prefix_tuning only")

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        """``init: vocab`` stands for ``{vocab: true}``; likewise ``random`` and ``zero``."""
        return {value: True} if value in ("vocab", "random", "zero") else value

    @model_validator(mode="after")
    def _one(self) -> Init:
        if sum([self.text is not None, self.vocab, self.random, self.zero]) != 1:
            raise ValueError("give exactly one of text, vocab, random, zero")
        return self


class Prompt(Section):
    """One named, trainable thing: virtual tokens and the encoder that makes them."""

    name: Name
    task: str
    method: Literal["prompt_tuning", "p_tuning", "prefix_tuning"] = Field(
        "prompt_tuning",
        description="prompt_tuning and p_tuning put virtual tokens in front of the text; "
        "prefix_tuning gives every layer keys and values instead",
    )
    encoder: Literal["embedding", "mlp"] | None = Field(
        None, description="default: mlp for p_tuning, else embedding"
    )
    encoder_hidden_size: PositiveInt | None = Field(
        None, description="default: the base's hidden size"
    )
    num_virtual_tokens: PositiveInt = 20
    init: Init = Field(default_factory=lambda: Init(vocab=True))
    learning_rate: PositiveFloat = 3.0e-3
    weight_decay: NonNegativeFloat = 0.0
    warmup_ratio: Share = Field(0.03, description="share of the steps")
    max_grad_norm: PositiveFloat | None = Field(1.0, description="null: no clipping")
    seed: NonNegativeInt | None = Field(None, description="default: training.seed")

    @model_validator(mode="after")
    def _check(self) -> Prompt:
        if self.method == "prompt_tuning" and self.encoder not in (None, "embedding"):
            raise ValueError(
                f"encoder: prompt_tuning has no {self.encoder} encoder; use method: p_tuning"
            )
        if self.method == "p_tuning" and self.encoder == "embedding":
            raise ValueError(
                "encoder: p_tuning trains an encoder; use mlp, or method: prompt_tuning"
            )
        if self.encoder_name == "embedding" and self.encoder_hidden_size is not None:
            instead = "encoder: mlp" if self.method == "prefix_tuning" else "p_tuning"
            raise ValueError(
                f"encoder_hidden_size: {self.method} has no encoder; remove it, or use {instead}"
            )
        if self.init.zero and self.method != "prefix_tuning":
            raise ValueError(
                "init: zero leaves the base nothing to read; use text, vocab or random, or "
                "method: prefix_tuning"
            )
        return self

    @property
    def encoder_name(self) -> str:
        return self.encoder or ("mlp" if self.method == "p_tuning" else "embedding")


class Training(Section):
    """How long, and how much a step reads."""

    steps: PositiveInt
    tokens_per_step: PositiveInt = Field(
        8192,
        description="most useful tokens of one prompt's update, over all ranks and micro-batches",
    )
    micro_batch_tokens: Literal["auto"] | int = Field(
        "auto",
        description="most tokens of one stream; auto: as many as memory holds and a step needs",
    )
    seed: NonNegativeInt = 0
    max_skipped_updates: PositiveInt = Field(
        5, description="non-finite updates in a row before the run stops"
    )

    @field_validator("micro_batch_tokens", mode="before")
    @classmethod
    def _check_tokens(cls, value: Any) -> Any:
        number = isinstance(value, int) and not isinstance(value, bool) and value > 0
        if value != "auto" and not number:
            raise ValueError(f"{value!r} is not auto or a number of tokens")
        return value


class EarlyStopping(Section):
    """Stop a prompt whose validation loss has not improved for ``patience`` evaluations."""

    patience: PositiveInt


class Evaluation(Section):
    every: PositiveInt = Field(50, description="steps between validations; the last step always is")
    early_stopping: EarlyStopping | None = None


class Checkpoint(Section):
    every: PositiveInt = Field(50, description="steps between checkpoints; the last step always is")
    keep: PositiveInt = Field(3, description="newest checkpoints that are kept")


class Tracking(Section):
    experiment: str = Field("promptshard", min_length=1)
    uri: str | None = Field(None, description="null: $MLFLOW_TRACKING_URI, or SQLite in output_dir")
    system_metrics: bool = Field(True, description="CPU, memory and GPU load of rank 0's node")


class RunConfig(Section):
    """A whole run file."""

    output_dir: str
    base: Base
    engine: Engine = Field(default_factory=Engine)
    tasks: Annotated[list[Task], Field(min_length=1)]
    prompts: Annotated[list[Prompt], Field(min_length=1)]
    training: Training
    evaluation: Evaluation = Field(default_factory=Evaluation)
    checkpoint: Checkpoint = Field(default_factory=Checkpoint)
    tracking: Tracking = Field(default_factory=Tracking)

    @field_validator("output_dir")
    @classmethod
    def _folder(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("is empty; name a folder")
        return str(Path(value).expanduser())

    @field_validator("tasks", "prompts")
    @classmethod
    def _unique_names(cls, items: list[Any]) -> list[Any]:
        names = [item.name for item in items]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"names must differ; used more than once: {', '.join(twice)}")
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
        without = [task.name for task in self.tasks if not task.has_validation]
        if self.evaluation.early_stopping and without:
            problems.append(
                f"evaluation.early_stopping: task {without[0]!r} has no validation to stop by; "
                "name a file or a validation_share, or remove early_stopping"
            )
        return _checked(self, problems)

    def task(self, name: str) -> Task:
        return next(task for task in self.tasks if task.name == name)

    def prompt_seed(self, prompt: Prompt) -> int:
        return self.training.seed if prompt.seed is None else prompt.seed


def parse_bytes(size: Any) -> int:
    """``24GB``, ``500 MB`` or ``1.5TB`` as a number of bytes; units are powers of ten.

    Raises:
        ValueError: if it is not written so.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT])B", str(size))
    if match is None:
        raise ValueError(f"{size!r} is no size; write a number and KB, MB, GB or TB, as 24GB")
    return int(float(match[1]) * 1000 ** (1 + "KMGT".index(match[2])))


#: A ``{column}`` field of a template, or a doubled brace that stands for one.
PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([^{}]+)\}")


def template_fields(template: str) -> list[str]:
    """Columns of a template in order, each once: ``{column}``; ``{{`` and ``}}`` are braces."""
    return list(dict.fromkeys(name for name in PLACEHOLDER.findall(template) if name))


def resolve_path(path: str) -> Path:
    """A path of the run file: from the working folder, else from the project's own files."""
    here = Path(path).expanduser()
    shipped = PROJECT_ROOT / path
    return shipped if not here.exists() and shipped.exists() else here


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read, override and check a run file.

    Raises:
        BadInput: with every problem found, as ``FILE:LINE: setting: what is wrong; remedy``, or
            ``override 'key=value': setting: ...`` where the value came from the command line.
    """
    source = runfile.read(Path(path), overrides)
    try:
        return RunConfig.model_validate(source.data)
    except ValidationError as error:
        raise BadInput(runfile.explain(error, source, RunConfig, NOT_YET, NOT_YET_KEYS)) from None


def load_output(folder: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The run file that a run saved in its output folder, wherever that folder lies now.

    Raises:
        BadInput: as ``load``.
    """
    # JSON is YAML: no path is taken for anything but text.
    here = f"output_dir={json.dumps(str(folder), ensure_ascii=False)}"
    return load(Path(folder) / "run.yaml", [*overrides, here])


class _BaseAlone(Section):
    base: Base


def load_base(model: str, overrides: Sequence[str] = ()) -> Base:
    """The settings of a base that no run file names: defaults, and overrides of ``base.*``.

    Raises:
        BadInput: as ``load``.
    """
    source = runfile.override(runfile.Source(model, {"base": {"model": model}}, {}), overrides)
    try:
        return _BaseAlone.model_validate(source.data).base
    except ValidationError as error:
        raise BadInput(runfile.explain(error, source, _BaseAlone, NOT_YET, NOT_YET_KEYS)) from None


def dump(config: RunConfig) -> str:
    """The resolved run file as YAML, every default written out."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
