"""Tasks: rows, template and metric."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from trainer.config.types import (
    Name,
    Number,
    PathText,
    PositiveFloat,
    PositiveInt,
    Section,
    checked,
)

#: Metrics for which less is better.
LOWER_IS_BETTER = frozenset({"loss"})
#: Column of the tools that a dialogue may call, as TRL names it.
DEFAULT_TOOLS = "tools"
#: A ``{column}`` field of a template, or a doubled brace that stands for one.
PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([^{}]+)\}")


class DataSource(Section):
    """Where rows come from: files, a folder of ``Dataset.save_to_disk``, or a hub data set."""

    path: PathText | None = Field(
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
        return checked(self, [f"{key}: only a hub data set has one" for key in alone])

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
        description="one or a list of: a jsonl (or ndjson), json, csv, tsv or txt file, each also "
        "compressed as .gz, a parquet or arrow file, a glob, a folder of save_to_disk, hf://NAME, "
        "or a mapping with weight and max_rows"
    )
    validation: Sources | None = Field(
        None, description="rows never trained on; null: validation_share of the train rows"
    )
    shifted_validation: Sources | None = Field(
        None, description="rows that ask the same in another context: shows overfitting"
    )
    validation_share: Annotated[float, Number, Field(ge=0, lt=1)] | None = Field(
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
    target: str = Field(
        "",
        description="template with {column} fields: what it should write; may be missing where all "
        "prompts of the task have objective: distill",
    )
    messages: str | None = Field(
        None,
        description="in place of input and target: the column that holds a dialogue, a list of "
        "{role, content} or, as in ShareGPT, {from, value}; written by the tokenizer's chat "
        "template, the assistant's turns learned, but for those with weight: 0",
    )
    tools: str | None = Field(
        DEFAULT_TOOLS,
        min_length=1,
        description="messages: the column of the tools that a dialogue may call, a list of JSON "
        "schemas for the chat template; the default is read where rows have it; null: none",
    )
    tokens: TokenColumns | None = Field(
        None, description="in place of input and target: columns of token ids and labels"
    )
    choices: list[str] | None = Field(
        None,
        description="values of the target's one column, scored by their likelihood; each is text "
        "as it is written here (01, no), a whole number also matches 1.0, and a column of class "
        "numbers (datasets' ClassLabel) has the names of its classes",
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
    stop: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list,
        description="strings that end a generated text, which is cut before the first of them (as "
        "until in lm-evaluation-harness); besides the end tokens of the base's "
        "generation_config.json and, with append_eos, EOS",
    )
    hand_written: list[Annotated[str, Field(pattern=r"\S")]] = Field(
        default_factory=list, description="hard prompts to compare with, put in front of the input"
    )

    @field_validator("choices", mode="before")
    @classmethod
    def _as_text(cls, choices: Any) -> Any:
        """Rows are compared as text, so ``[0, 1]`` is as good as ``["0", "1"]``."""
        if not isinstance(choices, list):
            return choices
        if any(isinstance(choice, bool) for choice in choices):
            raise ValueError('true and false are not text; put them in quotes: "true"')
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
        twice = [text for text in self.hand_written if self.hand_written.count(text) > 1]
        if twice:
            problems.append(f"hand_written: {twice[0]!r} is listed more than once; remove one")
        if self.tests != "tests" and self.metric != "execution":
            problems.append(f"tests: metric {self.metric} runs none; use metric: execution")
        return checked(self, problems)

    def _problems_of_form(self) -> list[str]:
        """Exactly one of: input and target, messages, tokens."""
        other = [name for name in ("messages", "tokens") if getattr(self, name) is not None]
        if self.messages is None and self.tools not in (None, DEFAULT_TOOLS):
            return ["tools: only dialogues have them; name their column in messages, or remove it"]
        if not other:
            problems = [] if self.input else ["input: is missing; add it"]
            problems += self._problems_without_target() if not self.target else []
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
        if self.tools is not None and self.tools == self.messages:
            problems.append("tools: is the column of messages; name that of the tools, or null")
        if self.metric not in allowed:
            problems.append(
                f"metric: {self.metric!r} needs input and target; with {other[0]} use "
                f"{' or '.join(allowed)}"
            )
        return problems

    def _problems_without_target(self) -> list[str]:
        """The run file checks that a teacher takes its place; choices say by themselves."""
        if self.metric == "loss" or self.choices:
            return []
        return [f"metric: {self.metric!r} needs a target; add it, or use loss"]

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


def template_fields(template: str) -> list[str]:
    """Columns of a template in order, each once: ``{column}``; ``{{`` and ``}}`` are braces."""
    return list(dict.fromkeys(name for name in PLACEHOLDER.findall(template) if name))
