"""Guess from the rows of a data file which columns are input, target, label or dialogue."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trainer.config import DataSource, WrittenSource
from trainer.config.task import VIRTUAL_TOKENS
from trainer.runtime.errors import BadInput

if TYPE_CHECKING:
    from trainer.data.data_files import DataFile

#: Maximum number of rows that are read.
MAX_ROWS = 100_000
#: Maximum number of different values of a column of labels, and of one without a usual name.
MAX_LABELS, _MAX_UNNAMED_LABELS = 200, 50
#: Maximum number of words of labels with a usual name that are different in most rows.
_LABEL_WORDS = 5
#: Mean number of words of answers that are compared with generated ones.
_SHORT_ANSWER = 8
#: Usual names of columns, in order of preference.
# fmt: off
LABELS = (
    "label", "labels", "label_text", "class", "category", "intent", "topic", "sentiment", "target",
    "output", "answer", "y",
)
TARGETS = (
    "target", "output", "answer", "response", "completion", "summary", "translation", "code",
    "label", "chosen",
)
INPUTS = (
    "text", "input", "inputs", "sentence", "question", "prompt", "instruction", "context", "title",
    "content", "document", "article", "body", "review", "query", "source", "utterance", "message",
    "premise", "hypothesis", "sentence1", "sentence2",
)
# fmt: on
DIALOGUES = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat")
IDENTIFIERS = ("id", "idx", "index", "uuid", "guid", "url", "date", "time", "timestamp")


@dataclass
class Column:
    """What the rows of a file show of one column.

    Attributes:
        rows: number of rows with a value.
        blank: number of rows whose value is a blank text.
        begins_blank, ends_blank: number of texts that begin or end with white space.
        words: number of words of all texts.
        texts, lists, dialogues: number of rows in which the value is a text, a list, a dialogue.
        numbers: number of rows in which the value is a number, also as text.
        labels: different values as text, or those in lists; None: too many, or not labels.
        turns: number of rows with a list of turns, which may be part of a dialogue.
        objects: number of rows with an object or a list of objects.
        no_dialogue: why the first list is not a dialogue; empty if it is one.
    """

    name: str
    rows: int = 0
    blank: int = 0
    begins_blank: int = 0
    ends_blank: int = 0
    words: int = 0
    texts: int = 0
    lists: int = 0
    numbers: int = 0
    dialogues: int = 0
    turns: int = 0
    objects: int = 0
    labels: dict[str, None] | None = field(default_factory=dict)
    no_dialogue: str = ""

    def add(self, value: Any) -> None:
        self.rows += 1
        if isinstance(value, str):
            self.texts += 1
            self.blank += not value.strip()
            self.begins_blank += value[:1].isspace()
            self.ends_blank += value[-1:].isspace()
            self.words += len(value.split())
        self.lists += isinstance(value, list)
        self.numbers += _is_number(value)
        first = value[0] if isinstance(value, list) and value else value
        if isinstance(first, dict):
            self.objects += 1
            self.turns += isinstance(value, list) and bool({"role", "from"} & first.keys())
        if isinstance(value, list) or str(value).lstrip().startswith("["):
            problem = _no_dialogue(value)
            self.dialogues += not problem
            self.no_dialogue = self.no_dialogue or problem
        texts = [_label(item) for item in (value if isinstance(value, list) else [value])]
        is_vector = isinstance(value, list) and any(isinstance(item, float) for item in value)
        if self.labels is None or None in texts or is_vector:
            self.labels = None
        else:
            self.labels |= dict.fromkeys(text for text in texts if text and text.strip())
            if len(self.labels) > MAX_LABELS:
                self.labels = None


@dataclass(frozen=True)
class Sample:
    """Columns of the first rows of a data file.

    Attributes:
        source: name of the file in messages.
        rows: number of rows read.
        complete: whether these are all rows.
        note: about how a file is read; empty if it needs none.
    """

    source: str
    columns: list[Column]
    rows: int
    complete: bool
    note: str = ""

    @property
    def names(self) -> str:
        return ", ".join(column.name for column in self.columns)


def read_sample(train: WrittenSource) -> Sample:
    """Read the first rows of ``train``; raises ``BadInput`` if they cannot be read."""
    from trainer.data.data_files import find_files  # loads Arrow only where rows are read

    written = escape(train)
    sources = [
        DataSource.model_validate(source)
        for source in (written if isinstance(written, list) else [written])
    ]

    label = ", ".join(source.label for source in sources)
    columns: dict[str, Column] = {}
    classes: dict[str, list[str]] = {}
    rows, complete, note = 0, True, ""
    for file in [f for source in sources for f in find_files(source, "--train", "train")]:
        for name in file.header() or ():
            columns.setdefault(name, Column(name))
            classes[name] = file.class_names(name) or classes.get(name, [])
        for record in file.records(file.readable()):
            if record.problem:
                place = f"{file.name}:{record.line or f'row {record.row}'}"
                raise BadInput(f"--train: {place}: {record.problem}")
            if rows == MAX_ROWS:
                complete = False
                break
            rows += 1
            for name, value in record.values.items():
                if value is not None:
                    columns.setdefault(name, Column(name)).add(value)
        note = note or _note(file)
    if not rows:
        raise BadInput(f"--train: {label}: has no rows")
    for name, labels in classes.items():
        if labels:
            columns[name].labels = dict.fromkeys(labels)
    return Sample(label, list(columns.values()), rows, complete, note)


def _note(file: DataFile) -> str:
    """Return a note about how a file is read; raises ``BadInput`` if its header is likely a row."""
    from trainer.data.text_readers import format_of

    if file.table is None and format_of(file.files[0]) == ".txt":
        return f"{file.name}: each line is a row"
    reason, is_likely = file.missing_header()
    if not reason:
        return ""
    if is_likely:
        raise BadInput(
            f"--train: {file.name}:1: the first line must name the columns, but seems to be a row: "
            f"{reason}; add a line with {len(file.readable())} column names before it"
        )
    return (
        f"{file.name}:1: the first line is read as column names, but {reason}; if it is a row, add "
        "a line with column names before it, and write the run file again"
    )


def escape(source: WrittenSource) -> WrittenSource:
    """Escape ``$``, which begins a variable in paths of the run file."""
    if isinstance(source, dict):
        return {k: v.replace("$", "$$") if k == "path" else v for k, v in source.items()}
    if isinstance(source, list):
        return [path.replace("$", "$$") for path in source]
    return source.replace("$", "$$")


def find_label(sample: Sample) -> Column | None:
    """Return the column of labels: by name, else the last one with few different values."""
    possible = [c for c in sample.columns if c.labels is not None and len(c.labels) > 1]
    few = [c for c in possible if _has_few_values(sample, c)]
    named = [c for c in possible if c in few or _max_words(c) <= _LABEL_WORDS]
    return _preferred(named, LABELS) or next(reversed([*_no_inputs(few)]), None)


def other_labels(sample: Sample, label: Column) -> list[Column]:
    """Return the other columns that may be the labels; none if the name of ``label`` is usual."""
    if label.name.lower() in LABELS:
        return []
    few = [c for c in sample.columns if len(c.labels or ()) > 1 and _has_few_values(sample, c)]
    return [column for column in _no_inputs(few) if column is not label]


def _has_few_values(sample: Sample, column: Column) -> bool:
    most = min(_MAX_UNNAMED_LABELS, max(2, sample.rows // 4))
    return column.labels is not None and len(column.labels) <= most


def _max_words(column: Column) -> int:
    return max(len(label.split()) for label in column.labels or [""])


def find_target(sample: Sample) -> Column | None:
    """Return the column of texts to write: by name, else the last one."""
    possible = [c for c in sample.columns if 0 < c.rows == c.texts and not _is_identifier(c)]
    return _preferred(possible, TARGETS) or next(reversed([*_no_inputs(possible)]), None)


def find_inputs(sample: Sample, target: Column | None) -> list[Column]:
    """Return the columns to read: those with usual names, else all other texts.

    Only columns with usual names may be missing in some rows.
    """
    scalars = [
        c
        for c in sample.columns
        if c is not target and c.rows > 0 == c.lists + c.objects and not _is_identifier(c)
    ]
    texts = [c for c in scalars if c.texts == c.rows > c.blank]
    usual = [column for column in texts if column.name.lower() in INPUTS]
    full = [c for c in scalars if c.rows == sample.rows]
    full_texts = [c for c in texts if c in full]
    sentences = [
        column
        for column in full_texts
        if column.numbers < column.rows
        and (not _has_few_values(sample, column) or _max_words(column) > _LABEL_WORDS)
    ]
    return usual or sentences or full_texts or full


def is_continuation(inputs: Sequence[Column], target: Column) -> bool:
    """Whether targets follow inputs as they are: white space separates the two in most rows."""
    return 2 * max(target.begins_blank, inputs[-1].ends_blank) > target.rows


def is_long(target: Column) -> bool:
    """Whether texts are so long that a generated one is hardly ever equal."""
    return target.words > _SHORT_ANSWER * target.texts


def num_without(sample: Sample, column: Column) -> int:
    """Return the number of rows without a value, or with a blank one, in a column."""
    return sample.rows - column.rows + column.blank


def find_dialogue(sample: Sample) -> Column | None:
    possible = [column for column in sample.columns if column.dialogues]
    return _preferred(possible, DIALOGUES) or next(iter(possible), None)


def problem_of_dialogues(sample: Sample) -> str:
    """Say why the column with a usual name has no dialogue; empty without such a column."""
    column = _preferred([c for c in sample.columns if c.no_dialogue], DIALOGUES)
    return f"{column.name}: {column.no_dialogue}" if column else ""


def divided_dialogue(sample: Sample) -> tuple[Column, Column] | None:
    """Return the columns of questions and answers if dialogues are divided into two columns."""
    turns = [column for column in sample.columns if column.turns and not column.dialogues]
    question = _preferred(turns, ("prompt",))
    answer = _preferred(turns, ("completion", "chosen"))
    return None if question is None or answer is None else (question, answer)


def unread(sample: Sample, used: Collection[str]) -> list[str]:
    """Return the columns of texts or lists that a run file does not use, but may need."""
    return [
        column.name
        for column in sample.columns
        if column.name not in used
        and not _is_identifier(column)
        and column.name.lower() != "rejected"
        and column.words + column.lists > column.blank
        and column.numbers < column.rows
        and (column.name.lower() == "system" or not _has_few_values(sample, column))
    ]


def nested(sample: Sample) -> list[Column]:
    """Return the columns of objects, which templates cannot read."""
    return [c for c in sample.columns if c.objects and not c.dialogues]


def similar_labels(labels: Collection[str]) -> list[str]:
    """Return the first labels that differ only in case or white space; empty if there are none."""
    groups: dict[str, list[str]] = {}
    for label in labels:
        groups.setdefault(" ".join(label.lower().split()), []).append(label)
    return next((group for group in groups.values() if len(group) > 1), [])


def sorted_labels(column: Column) -> list[str]:
    """Return the labels in order of appearance; numbers ascending, and 1.0 as 1 in all or none."""
    labels = list(column.labels or ())
    if not all(map(_is_number, labels)):
        return labels
    integers = [re.fullmatch(r"(-?\d+)(\.0+)?", label) for label in labels]
    if all(integers):
        labels = list(dict.fromkeys(match[1] for match in integers if match))
    return sorted(labels, key=float)


def template(columns: Sequence[Column]) -> str:
    return "\n".join(f"{{{column.name}}}" for column in columns)


def _preferred(columns: Sequence[Column], names: Collection[str]) -> Column | None:
    by_name = {column.name.lower(): column for column in columns}
    return next((by_name[name] for name in names if name in by_name), None)


def _no_inputs(columns: Sequence[Column]) -> Iterator[Column]:
    return (c for c in columns if c.name.lower() not in INPUTS and not _is_identifier(c))


def _is_identifier(column: Column) -> bool:
    name = column.name.lower()
    not_in_template = name == VIRTUAL_TOKENS or not name.strip() or "{" in name
    return name in IDENTIFIERS or name.endswith("_id") or not_in_template


def _no_dialogue(value: Any) -> str:
    """Return why a value is not a dialogue; empty if it is one."""
    from trainer.data.column_parsers import parse_messages

    try:
        parse_messages(value)
    except ValueError as error:
        return str(error)
    return ""


def _is_number(value: Any) -> bool:
    if isinstance(value, str):
        return re.fullmatch(r"\s*[-+]?\d+(\.\d+)?\s*", value) is not None
    return isinstance(value, int | float) and not isinstance(value, bool)


def _label(value: Any) -> str | None:
    """Return the text of a label as in ``choices``; None if the value cannot be one."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else None
    return str(value) if isinstance(value, str | int) else None
