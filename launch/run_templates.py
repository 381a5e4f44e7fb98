"""Render the commented run files of ``promptshard init``."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch import column_proposals, column_sample
from launch.column_sample import Column, Sample
from trainer.config import DEFAULT_TOOLS, WrittenSource, template_fields, yaml_parser
from trainer.config.schema import EDITOR_LINE
from trainer.runtime.errors import BadInput

TEMPLATES = Path(__file__).parent / "templates"
#: Kinds of run files.
KINDS = {
    "classify": "assign one of a few labels to a text",
    "chat": "answer in dialogues, with the chat template of the model",
    "generate": "write an answer to a text",
    "distill": "compress a long prompt in words; rows need no answers",
    "sweep": "compare settings of a classification in one run",
}
#: Shipped data of each kind.
SHIPPED_ROWS = {"chat": "chat", "generate": "codegen"}
TINY_BASE = "examples/tiny_base"
_TEACHERS = (
    "Classify the illness as metabolic, cardiac or other. Name the medical field of the diagnosis, "
    "not that of the medicine or of the test. Answer with one word.",
    "Write the long prompt here. The virtual tokens replace it.",
)


@dataclass(frozen=True)
class Request:
    """Options of ``promptshard init``; None: use what promptshard ships."""

    kind: str
    file: str
    output_dir: str
    model: str | None = None
    train: WrittenSource | None = None
    validation: WrittenSource | None = None


def render(request: Request) -> tuple[str, list[str]]:
    """Return the text of a run file, and notes about the data.

    Raises:
        BadInput: the data do not fit the kind of run file.
    """
    if request.train is None:
        return fill(f"{request.kind}.yaml.j2", _values(request) | _shipped_columns(request)), []
    sample = column_sample.read_sample(request.train)
    values = _values(request) | _columns(request, sample)
    notes = [sample.note] if sample.note else []
    if request.kind == "distill":
        notes.append("write the prompt to compress in prompts[0].teacher of the file")
    used = [name for key in ("input", "target") for name in template_fields(values.get(key, ""))]
    used += [values.get("messages", ""), DEFAULT_TOOLS]
    if "chosen" in used:
        notes.append("the answers in the column chosen are learned; those in rejected are not used")
    if unread := column_proposals.unread(sample, used):
        notes.append(f"columns that the run file does not use: {', '.join(unread)}")
    return fill(f"{request.kind}.yaml.j2", values), notes


def fill(template: str, values: Mapping[str, Any]) -> str:
    """Fill in one of ``TEMPLATES``; the filter ``path`` writes a path, ``yaml`` any value."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"yaml": _yaml, "comment": _comment, "path": _path}
    return environment.get_template(template).render(values)


def _values(request: Request) -> dict[str, Any]:
    rows = f"examples/data/{SHIPPED_ROWS.get(request.kind, 'triage')}"
    shipped, tiny = request.train is None, request.model is None
    validation = f"{rows}.valid.jsonl" if shipped else None
    small = shipped and tiny  # trains within minutes
    return {
        "editor_line": EDITOR_LINE,
        "file": shlex.quote(request.file),
        "kind": request.kind,
        "tiny": tiny,
        "shipped": shipped,
        "output_dir": column_sample.escape(request.output_dir),
        "model": column_sample.escape(request.model or TINY_BASE),
        "train": column_sample.escape(request.train or f"{rows}.train.jsonl"),
        "validation": column_sample.escape(request.validation or validation or ""),
        "teacher": _TEACHERS[0 if shipped else 1],
        "tokens": 10 if tiny else 20,
        "steps": 60 if small else 300,
        "first": 20 if small else 100,
        "every": 10 if small else 50,
        "tokens_per_step": 1024 if small else 8192,
    }


def _shipped_columns(request: Request) -> dict[str, Any]:
    target = "code" if request.kind == "generate" else "label"
    return {
        "columns": "",
        "messages": "messages",
        "input": "{text}\nAnswer:",
        "optional": [],
        "target": f" {{{target}}}",
        "metric": "exact_match",
        "choices": ["metabolic", "cardiac", "other"],
        "choices_note": "",
        "numeric": False,
        "other_labels": "",
        "multi": False,
    }


def _columns(request: Request, sample: Sample) -> dict[str, Any]:
    """Return the values that depend on the columns of the data."""
    propose: dict[str, Callable[[Request, Sample], dict[str, Any]]] = {
        "chat": _dialogue,
        "generate": _text,
        "distill": _unlabelled,
    }
    return {"columns": sample.names} | propose.get(request.kind, _classes)(request, sample)


def _dialogue(request: Request, sample: Sample) -> dict[str, Any]:
    column = column_proposals.find_dialogue(sample)
    if column is None:
        if problem := column_proposals.problem_of_dialogues(sample):
            raise BadInput(f"--train: {sample.source}: {problem}")
        raise _misfit(request, sample, "no column of dialogues")
    return {"messages": column.name}


def _text(request: Request, sample: Sample) -> dict[str, Any]:
    target = column_proposals.find_target(sample)
    if target is None:
        raise _misfit(request, sample, "no column of texts to learn")
    metric = "loss" if column_proposals.is_long(target) else "exact_match"
    return _input(request, sample, target) | {"metric": metric}


def _unlabelled(request: Request, sample: Sample) -> dict[str, Any]:
    return _input(request, sample, column_proposals.find_target(sample))


def _classes(request: Request, sample: Sample) -> dict[str, Any]:
    label = column_proposals.find_label(sample)
    if label is None:
        most = column_sample.MAX_LABELS
        raise _misfit(request, sample, f"no column with 2 to {most} different labels")
    choices = column_proposals.sorted_labels(label)
    others = [column.name for column in column_proposals.other_labels(sample, label)]
    note = "" if sample.complete else f" of the first {sample.rows:,} rows; add those of others"
    if similar := column_proposals.similar_labels(choices):
        note += f"; {_yaml(similar)} differ only in case or white space"
    return _input(request, sample, label) | {
        "choices": choices,
        "choices_note": note,
        "numeric": all(choice.lstrip("-").isdigit() for choice in choices),
        "other_labels": f" # or {', '.join(others)}" if others else "",
        "multi": bool(label.lists),
    }


def _input(request: Request, sample: Sample, target: Column | None) -> dict[str, Any]:
    inputs = column_proposals.find_inputs(sample, target)
    if not inputs and request.kind == "distill":
        inputs = column_proposals.find_inputs(sample, None)
    if not inputs:
        raise _misfit(request, sample, "no column of texts to read")
    without = {column.name: column_proposals.num_without(sample, column) for column in inputs}
    without = {name: rows for name, rows in without.items() if rows and len(inputs) > 1}
    counts = [f"{name} in {rows:,} of {sample.rows:,} rows" for name, rows in without.items()]
    follows = target is not None and column_proposals.is_continuation(inputs, target)
    return {
        "input": column_proposals.template(inputs) + ("" if follows else "\nAnswer:"),
        "target": ("" if follows else " ") + f"{{{target.name}}}" if target else "",
        "optional": list(without),
        "optional_note": ", ".join(counts),
    }


def _misfit(request: Request, sample: Sample, missing: str) -> BadInput:
    """Return an error with a remedy: how to convert the rows, or a kind that fits them."""
    problem = f"--train: {sample.source}: has {missing} (columns: {sample.names})"
    if pair := column_proposals.divided_dialogue(sample):
        names = [column.name for column in pair]
        both = " + ".join(f'row["{name}"]' for name in names)
        remedy = f"join the turns in {' and '.join(names)} in one column: " + _conversion(
            sample, f'.map(lambda row: {{"messages": {both}}})'
        )
        return BadInput(f"{problem}; {remedy}")
    remedies = ["name other data"]
    if request.kind == "generate" and len(column_proposals.find_inputs(sample, None)) == 1:
        remedies = ["divide each text into two columns, one to read and one to learn"]
    if nested := [column.name for column in column_proposals.nested(sample)]:
        remedies.append(f"write the values in {', '.join(nested)} in columns of their own")
    elif other := next((k for k in _FITS if k != request.kind and _FITS[k](sample)), ""):
        remedies.append(f"use `promptshard init {other}`: {KINDS[other]}")
    problem += "; " + ", or ".join(remedies)
    return BadInput(f"{problem} ({sample.note})" if sample.note else problem)


def _conversion(sample: Sample, change: str) -> str:
    """Return Python code that converts a file with the library datasets."""
    source, kind = sample.source, Path(sample.source).suffix.removeprefix(".")
    builder = kind if kind in ("csv", "parquet", "arrow") else "json"
    files = f'"{builder}", data_files={json.dumps(source)}'
    if source.startswith("hf://"):
        files = json.dumps(source.removeprefix("hf://"))
    return f'datasets.load_dataset({files}, split="train"){change}.to_json("NEW.jsonl")'


#: Whether rows fit a kind of run file, in order of preference.
_FITS: dict[str, Callable[[Sample], bool]] = {
    "chat": lambda sample: column_proposals.find_dialogue(sample) is not None,
    "generate": lambda sample: (
        (target := column_proposals.find_target(sample)) is not None
        and bool(column_proposals.find_inputs(sample, target))
    ),
    "distill": lambda sample: bool(column_proposals.find_inputs(sample, None)),
}


def _path(path: str) -> str:
    return _yaml(column_sample.escape(path))


def _yaml(value: Any) -> str:
    return yaml_parser.dump(value, one_line=True)


def _comment(text: str) -> str:
    """Escape and shorten a text, so that it fits on one line of comment."""
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return text if len(text) <= 80 else f"{text[:77]}..."
