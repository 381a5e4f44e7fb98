"""Read what ``promptshard init`` needs to know about the columns of a data file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trainer.config import DataSource, WrittenSource
from trainer.data import csv_reader
from trainer.runtime.errors import BadInput

if TYPE_CHECKING:
    from trainer.data.data_files import DataFile

#: Maximum number of rows that are read, and of rows that are kept.
MAX_ROWS, _KEPT_ROWS = 100_000, 100
#: Maximum number of different values of a column of labels.
MAX_LABELS = 200


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
        self.numbers += is_number(value)
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
        first: the first of them.
        complete: whether these are all rows.
        note: about how a file is read; empty if it needs none.
    """

    source: str
    columns: list[Column]
    rows: int
    first: list[dict[str, Any]]
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
    first: list[dict[str, Any]] = []
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
            if rows <= _KEPT_ROWS:
                first.append(record.values)
            for name, value in record.values.items():
                column = columns.setdefault(name, Column(name))
                if value is not None:
                    column.add(value)
        note = note or _note(file)
    if not rows:
        raise BadInput(f"--train: {label}: has no rows")
    for name, labels in classes.items():
        if labels:
            columns[name].labels = dict.fromkeys(labels)
    return Sample(label, list(columns.values()), rows, first, complete, note)


def _note(file: DataFile) -> str:
    """Return a note about how a file is read; raises ``BadInput`` for spaces after separators."""
    from trainer.data.text_readers import format_of

    if file.table is None and format_of(file.files[0]) == ".txt":
        return f"{file.name}: each line is a row"
    names = [] if file.table is not None else file.header() or []
    if spaced := next((name for name in names if name.strip() and name[0] == " "), None):
        raise BadInput(
            f"--train: {file.name}: the name of column {spaced!r} begins with a space; "
            "remove spaces around separators, as pandas.read_csv(FILE, skipinitialspace=True)"
            ".to_csv(NEW_FILE, index=False) does, or rename the column"
        )
    note = file.note_of_header()
    return f"{file.name}:1: {note}, and write the run file again" if note else ""


def escape(source: WrittenSource) -> WrittenSource:
    """Escape ``$``, which begins a variable in paths of the run file."""
    if isinstance(source, dict):
        return {k: v.replace("$", "$$") if k == "path" else v for k, v in source.items()}
    if isinstance(source, list):
        return [path.replace("$", "$$") for path in source]
    return source.replace("$", "$$")


def is_number(value: Any) -> bool:
    if isinstance(value, str):
        return csv_reader.is_number(value)
    return isinstance(value, int | float) and not isinstance(value, bool)


def _no_dialogue(value: Any) -> str:
    """Return why a value is not a dialogue; empty if it is one."""
    from trainer.data.column_parsers import parse_messages

    try:
        parse_messages(value)
    except ValueError as error:
        return str(error)
    return ""


def _label(value: Any) -> str | None:
    """Return the text of a label as in ``choices``; None if the value cannot be one."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else None
    return str(value) if isinstance(value, str | int) else None
