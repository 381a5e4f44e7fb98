"""Settings of a task: rows, template and metric."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from trainer.config.data_source import Sources
from trainer.config.types import (
    Name,
    Number,
    PositiveInt,
    Section,
    checked,
)
from trainer.runtime.errors import did_you_mean

LOWER_IS_BETTER = frozenset({"loss"})
#: Default columns that rows may lack: of the tools that a dialogue may call, as in TRL; of the mask
#: of token ids, as in transformers.
DEFAULT_TOOLS, DEFAULT_MASK = "tools", "attention_mask"
#: Arguments of transformers' ``apply_chat_template``, and variables that it sets.
_TEMPLATE_ARGUMENTS = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "conversations",
        "max_length",
        "messages",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "sanitize_control_tokens",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    }
)
#: A ``{column}`` field of a template, or a doubled brace (an escaped one).
PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([^{}]+)\}")
#: The field of an input template that marks the place of the virtual tokens.
VIRTUAL_TOKENS = "virtual_tokens"


#: Default share of the train rows that is held out for validation.
DEFAULT_VALIDATION_SHARE = 0.1


class TokenColumns(Section):
    """Columns of tokenized data."""

    input_ids: str = Field("input_ids", min_length=1, description="column of the token ids")
    labels: str = Field(
        "labels",
        min_length=1,
        description="column of the labels: the token id, or -100 to ignore the position",
    )
    attention_mask: str | None = Field(
        DEFAULT_MASK,
        min_length=1,
        description="column of the mask: 0 where a token is padding, otherwise 1\n"
        "Padding is removed. The default column may be missing.\n"
        "null: rows are not padded",
    )


class Task(Section):
    """A task: data, template and metric."""

    name: Name = Field(description="your name for the task; prompts refer to it")
    train: Sources = Field(
        description="training rows: a source, or a list of sources\n"
        "A source is a jsonl (ndjson), json, csv, tsv or txt file (also .gz), a parquet or arrow "
        "file, a glob, a folder of save_to_disk, hf://NAME, or a mapping. A mixture is a list of "
        "mappings with weight and max_rows."
    )
    validation: Sources | None = Field(
        None,
        description="held-out rows, as train\nnull: validation_share of the train rows",
    )
    shifted_validation: Sources | None = Field(
        None,
        description="out-of-distribution validation rows, as train\n"
        "The same task in another context, to detect overfitting.\n"
        "null: none",
    )
    validation_share: Annotated[float, Number, Field(ge=0, lt=1)] | None = Field(
        None,
        description="share of the train rows held out for validation\n"
        "Selected by a hash of their content, so that duplicates stay in one split and added rows "
        "move no others.\n"
        "null: 0.1, or 0 with validation\n"
        "0: no validation",
    )
    max_rows: PositiveInt | None = Field(
        None,
        description="maximum number of train rows\n"
        "Those with the smallest hash of their content, so that a smaller selection is a subset of "
        "a larger one and does not depend on the order of the file.\n"
        "null: all rows",
    )
    max_validation_rows: PositiveInt | None = Field(
        None,
        description="maximum number of rows of validation and of shifted_validation\n"
        "null: all rows",
    )
    input: str = Field(
        "",
        description="template of the text that the base reads, with {column} fields\n"
        "{virtual_tokens} marks the place of the prompt; default: before everything. Fixed text "
        "around it, up to the first column, becomes part of the prompt and costs nothing per row.\n"
        'Required, except with messages or tokens. For example "{text}\\nTopic:".',
    )
    optional: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list,
        json_schema_extra={"default": []},
        description="columns of input that rows may lack\n"
        "A missing or null value is read as an empty text, such as the input of some instructions.",
    )
    target: str = Field(
        "",
        description="template of the text to learn, with {column} fields\n"
        'For example " {label}", with the space. Optional if all prompts of the task have '
        "objective: distill.",
    )
    messages: str | None = Field(
        None,
        description="column of dialogues, instead of input and target\n"
        "Lists of {role, content} or {from, value} (ShareGPT), rendered by the tokenizer's chat "
        "template. The assistant's turns are learned, except those with weight: 0. A dialogue is "
        "one row of an epoch, whatever its number of turns. If the template rewrites earlier "
        "turns, each learned turn is read after the text that generation reads before it, and "
        "tokens in common are read and counted once.\n"
        "null: rows have input and target, or tokens",
    )
    tools: str | None = Field(
        DEFAULT_TOOLS,
        min_length=1,
        description="messages: column of the tools that a dialogue may call\n"
        "JSON schemas for the chat template. The default column may be missing.\n"
        "null: no tools",
    )
    chat: bool = Field(
        False,
        description="write input and target with the base's chat template\n"
        "true: the input is a user's turn and the target is the assistant's answer; hand_written "
        "prompts and teachers are then texts of the system",
    )
    system: str | None = Field(
        None,
        min_length=1,
        description="chat: text of the system in every row\nnull: none",
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        json_schema_extra={"default": {}},
        description="messages, chat: variables for the chat template, such as "
        "{enable_thinking: false}",
    )
    tokens: TokenColumns | None = Field(
        None,
        description="columns of token ids and labels, instead of input and target\n"
        "{} uses the default columns.\n"
        "null: rows have input and target, or messages",
    )
    choices: list[str] | None = Field(
        None,
        description="label set: the values of the target's only column\n"
        "Scored by likelihood. Values are text exactly as written here (01, no); an integer also "
        "matches 1.0. A column of class numbers (datasets' ClassLabel) is read as its class "
        "names.\n"
        "null: the target is any text",
    )
    multi_label: bool = Field(
        False, description="the target's column has a list of choices; scored by generating"
    )
    label_separator: str = Field(
        ", ", min_length=1, description="multi_label: separator between the labels of a row"
    )
    metric: Literal["accuracy", "exact_match", "f1", "execution", "loss"] = Field(
        "loss",
        description="metric by which prompts of the task are ranked\n"
        "accuracy: share of rows whose most likely choice is right; needs choices\n"
        "exact_match: share of rows whose generated text equals the target\n"
        "f1: micro-averaged over the labels of all rows; needs multi_label\n"
        "execution: share of rows whose generated code passes its tests, run in a sandbox\n"
        "loss: validation loss; lower is better",
    )
    tests: str = Field("tests", description="metric execution: column of the test calls")
    append_eos: bool = Field(True, description="learn the end-of-sequence token after the target")
    too_long: Literal["refuse", "skip", "truncate"] = Field(
        "refuse",
        description="what happens to rows longer than the context\n"
        "refuse: the run ends with an error\n"
        "skip: they are left out\n"
        "truncate: the input is cut from the left; with messages, the oldest turns are left out; "
        "with chat, the longest column of the input is cut from the left",
    )
    max_new_tokens: PositiveInt = Field(
        64, description="maximum length of generated text, in tokens"
    )
    stop: list[Annotated[str, Field(min_length=1)]] = Field(
        default_factory=list,
        json_schema_extra={"default": []},
        description="strings that end generated text\n"
        "The text is cut before the first of them (like until in lm-evaluation-harness). It also "
        "ends at the end tokens of the base's generation_config.json and, with append_eos, at EOS.",
    )
    hand_written: list[Annotated[str, Field(pattern=r"\S")]] = Field(
        default_factory=list,
        json_schema_extra={"default": []},
        description="prompts in words to compare with\n"
        "Inserted before the input, or at {virtual_tokens}.",
    )
    paraphrases: list[str] = Field(
        default_factory=list,
        json_schema_extra={"default": []},
        description="input in other words, with the same columns\n"
        "promptshard evaluate --robustness scores the prompts with each; training does not use "
        "them.",
    )

    @field_validator("choices", mode="before")
    @classmethod
    def _as_text(cls, choices: Any) -> Any:
        """Convert numbers to text: choices are compared with rows as text."""
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
        """Share of the train rows that is held out for validation."""
        if self.validation is not None:
            return 0.0
        share = self.validation_share
        return DEFAULT_VALIDATION_SHARE if share is None else share

    @property
    def is_chat(self) -> bool:
        """Whether the base's chat template writes the rows."""
        return self.chat or self.messages is not None

    @property
    def scored_by_likelihood(self) -> bool:
        """Whether every choice is scored on every row, instead of the row's own target only."""
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
                problems.append(f"{name}: weight works with train only; remove it")
        if self.validation is not None and self.validation_share is not None:
            problems.append("validation_share: validation is set too; remove one")
        if not self.has_validation:
            for name in ("shifted_validation", "hand_written"):
                if getattr(self, name):
                    problems.append(
                        f"{name}: needs validation rows; set validation or validation_share"
                    )
        marked = "{" + VIRTUAL_TOKENS + "}"
        if any(marked in text for text in self.hand_written):
            problems.append(f"hand_written: is inserted at {marked} of input; remove it here")
        if marked in (self.system or ""):
            problems.append(f"system: {marked} works in input only; use prompts.position: system")
        twice = [text for text in self.hand_written if self.hand_written.count(text) > 1]
        if twice:
            problems.append(f"hand_written: {twice[0]!r} is listed more than once; remove one")
        problems += self._problems_of_optional()
        problems += self._problems_of_paraphrases()
        if self.tests != "tests" and self.metric != "execution":
            problems.append(f"tests: metric {self.metric} does not use it; use metric: execution")
        return checked(self, problems)

    def _problems_of_form(self) -> list[str]:
        """Check that a task has exactly one of: input and target, messages, tokens."""
        other = [name for name in ("messages", "tokens") if getattr(self, name) is not None]
        if not self.is_chat and self.chat_template_kwargs:
            return ["chat_template_kwargs: works with messages or chat only; set one, or remove it"]
        if other and self.chat:
            return [f"chat: needs input and target; rows come from {other[0]}; remove one"]
        if self.system is not None and not self.chat:
            return ["system: works with chat: true only; set it, or remove system"]
        reserved = sorted(_TEMPLATE_ARGUMENTS & self.chat_template_kwargs.keys())
        if reserved:
            return [f"chat_template_kwargs.{reserved[0]}: is set by this program; remove it"]
        if self.messages is None and self.tools not in (None, DEFAULT_TOOLS):
            return ["tools: works with messages only; set messages, or remove it"]
        if not other:
            problems = [] if self.input else ["input: is missing; add it"]
            problems += self._problems_without_target() if not self.target else []
            if self.input and not template_fields(self.input):
                problems.append("input: has no {column} field, so all rows would be the same")
            if len(_fields(self.input, VIRTUAL_TOKENS)) > 1:
                problems.append("input: has {virtual_tokens} more than once; keep one")
            if _fields(self.target, VIRTUAL_TOKENS):
                problems.append("target: {virtual_tokens} works in input only; move it there")
            if self.chat and not self.target:
                problems.append("target: is missing; chat needs the answer to learn")
            if self.chat and self.multi_label:
                problems.append("multi_label: does not work with chat; remove one")
            return problems
        is_tokens = other[0] == "tokens"
        allowed = ("loss",) if is_tokens else ("loss", "exact_match", "accuracy")
        clash = [*other[1:], *(n for n in ("input", "target") if getattr(self, n))]
        problems = [f"{name}: rows come from {other[0]}; remove one" for name in clash]
        problems += [
            f"{name}: needs input and target; rows come from {other[0]}"
            for name in ("choices", "hand_written")
            if is_tokens and getattr(self, name)
        ]
        if self.tools is not None and self.tools == self.messages:
            problems.append(
                "tools: is the same column as messages; name the column of the tools, or use null"
            )
        if self.metric not in allowed:
            problems.append(
                f"metric: {self.metric!r} needs input and target; with {other[0]} use "
                f"{' or '.join(allowed)}"
            )
        return problems

    def _problems_of_optional(self) -> list[str]:
        columns, target = template_fields(self.input), template_fields(self.target)
        known = f"its columns: {', '.join(columns) or 'none'}"
        problems = [
            f"optional: {name!r} is not a column of input{did_you_mean(name, columns)}; {known}"
            for name in self.optional
            if name not in columns
        ]
        return problems + [
            f"optional: {name!r} is also a column of target, which every row needs; remove it"
            for name in self.optional
            if name in target
        ]

    def _problems_of_paraphrases(self) -> list[str]:
        if self.paraphrases and not self.input:
            return ["paraphrases: need input, which they replace; remove them"]
        columns, placed = set(template_fields(self.input)), split_template(self.input) is None
        return [
            f"paraphrases: {text!r} must have the fields of input, and no others: "
            f"{', '.join(_field_names(self.input))}"
            for text in self.paraphrases
            if set(template_fields(text)) != columns or (split_template(text) is None) != placed
        ]

    def _problems_without_target(self) -> list[str]:
        """Return problems of a task without target; ``RunConfig`` checks if it needs one."""
        if self.metric == "loss" or self.choices:
            return []
        return [f"metric: {self.metric!r} needs a target; set target, or use metric: loss"]

    def _problems_of_choices(self) -> list[str]:
        problems = []
        if self.metric == "accuracy" and not self.choices:
            problems.append(
                "choices: metric accuracy needs them; list the labels, or use exact_match"
            )
        if self.choices is not None:
            fields = template_fields(self.target)
            if self.messages is None and len(fields) != 1:
                problems.append(
                    "choices: target must have exactly one {column} field, "
                    f"but has {len(fields)}: {self.target!r}"
                )
            if len(self.choices) < 2 or len(set(self.choices)) != len(self.choices):
                problems.append(f"choices: {self.choices} must be at least two different values")
        if self.multi_label:
            problems += self._problems_of_labels()
        elif self.metric == "f1":
            problems.append("metric: f1 compares sets of labels; set multi_label: true")
        return problems

    def _problems_of_labels(self) -> list[str]:
        if self.choices is None:
            return ["choices: multi_label needs them; list the labels"]
        mark = self.label_separator.strip() or self.label_separator
        inside = [choice for choice in self.choices if mark in choice]
        problems = [
            f"label_separator: {self.label_separator!r} also occurs in the choice {choice!r}; "
            "use another"
            for choice in inside[:1]
        ]
        if self.metric not in ("f1", "exact_match", "loss"):
            problems.append(
                f"metric: {self.metric!r} compares single labels; use f1 or exact_match"
            )
        return problems


def template_fields(template: str) -> list[str]:
    """Return the columns of a template in order, without repeats; ``{{`` and ``}}`` are braces."""
    names = dict.fromkeys(name for name in PLACEHOLDER.findall(template) if name)
    return [name for name in names if name != VIRTUAL_TOKENS]


def _field_names(template: str) -> list[str]:
    placed = [VIRTUAL_TOKENS] if _fields(template, VIRTUAL_TOKENS) else []
    return [f"{{{name}}}" for name in (*placed, *template_fields(template))]


def split_template(template: str) -> tuple[str, str] | None:
    """Return the template before and after ``{virtual_tokens}``; None without this field."""
    fields = _fields(template, VIRTUAL_TOKENS)
    return (template[: fields[0].start()], template[fields[0].end() :]) if fields else None


def fixed_beginning(template: str) -> str:
    """Return the part of a template before its first column."""
    columns = template_fields(template)
    first = min((_fields(template, name)[0].start() for name in columns), default=len(template))
    return template[:first]


def _fields(template: str, name: str) -> list[re.Match[str]]:
    return [match for match in PLACEHOLDER.finditer(template) if match[1] == name]
