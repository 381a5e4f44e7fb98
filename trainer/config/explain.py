"""Messages for pydantic's errors, with line, setting, value and remedy."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from trainer.config.aliases import find_alias
from trainer.config.yaml_parser import SettingPath
from trainer.config.yaml_source import MOST_PROBLEMS, YamlSource, dotted, shown
from trainer.runtime.errors import did_you_mean


def explain(
    error: ValidationError,
    source: YamlSource,
    model: type[BaseModel],
    not_yet_keys: Mapping[str, str],
) -> list[str]:
    """Return one line per distinct validation error: place, setting, value and remedy.

    Args:
        model: model of the run file, to list its settings.
        not_yet_keys: path of an unsupported setting, without list indices -> remedy.
    """
    problems: list[str] = []
    unions: dict[SettingPath, Any] = {}
    for item in error.errors():
        path = tuple(item["loc"])
        if item["type"] != "extra_forbidden" and path and _is_union_tag(path[-1]):
            # pydantic reports an error for each type of a union; together they are one problem
            path = path[:-1]
            if path in unions:
                continue
            unions[path] = True
            place = source.written(path)
            what = _one_of(dotted(place), item["input"], _union_values(model, path))
            problems.append(f"{source.where(place)}: {what}")
        elif item["type"] == "value_error":
            for reason in str(item["ctx"]["error"]).split("\n"):
                inner, text = _inner_path(reason)
                full = source.written((*path, *inner))
                setting = f"{dotted(full)}: " if full else ""
                problems.append(f"{source.where(full)}: {setting}{text}")
        else:
            place = source.written(path)
            text = _word(dotted(place), path, dict(item), model, not_yet_keys)
            problems.append(f"{source.where(place)}: {text}")
    problems = list(dict.fromkeys(problems))  # all prompts of a sweep have the same errors
    more = len(problems) - MOST_PROBLEMS
    return problems[:MOST_PROBLEMS] + ([f"{source.file}: and {more} more"] if more > 0 else [])


def _word(
    setting: str,
    path: SettingPath,
    item: Mapping[str, Any],
    model: type[BaseModel],
    not_yet_keys: Mapping[str, str],
) -> str:
    kind, value = item["type"], item.get("input")
    generic = ".".join(str(part) for part in path if not isinstance(part, int))
    if kind == "extra_forbidden":
        if generic in not_yet_keys:
            return f"{setting}: not supported yet; {not_yet_keys[generic]}"
        return f"{setting}: {_unknown(generic, _section(model, path[:-1]), model)}"
    if kind == "missing":
        return f"{setting}: is missing; add it"
    if isinstance(value, str) and f"{generic}.{value}" in not_yet_keys:
        return f"{setting}: {value!r} is not supported yet; {not_yet_keys[f'{generic}.{value}']}"
    if kind == "literal_error":
        return _one_of(setting, value, re.findall(r"'([^']*)'", item["ctx"]["expected"]))
    if kind == "model_type":
        known = _settings(_section(model, path))
        if value is None:
            return f"{setting}: is empty; remove it, or give a setting: {', '.join(known)}"
        return f"{setting}: {shown(value)} must be a mapping; known: {', '.join(known)}"
    if kind in ("tuple_type", "too_long"):  # betas is the only list with a maximum
        return f"{setting}: {shown(value)} must be a list of two numbers, as [0.8, 0.99]"
    if kind == "list_type":
        return f"{setting}: {shown(value)} must be a list; start every item with a dash"
    if kind == "too_short":
        return f"{setting}: {shown(value)} is empty; give at least one"
    if kind == "string_type":
        return f"{setting}: {shown(value)} must be a string; put it in quotes"
    if kind == "string_pattern_mismatch":
        is_name = item["ctx"]["pattern"].startswith("^")
        rule = "must be letters, digits and . _ -, and begin with a letter or digit"
        return f"{setting}: {shown(value)} {rule if is_name else 'is blank; write a text'}"
    if kind in ("bool_parsing", "bool_type"):
        return f"{setting}: {shown(value)} is neither true nor false"
    if kind in ("int_parsing", "int_type", "int_from_float"):
        return f"{setting}: {shown(value)} is not an integer"
    if kind in ("float_parsing", "float_type"):
        return f"{setting}: {shown(value)} is not a number"
    reason = re.sub(r"^Input should be", "must be", item["msg"])
    return f"{setting}: {shown(value)} {reason[0].lower() + reason[1:]}"


def _unknown(name: str, section: type[BaseModel], model: type[BaseModel]) -> str:
    """Explain a name that is no setting of its section: translate it, or suggest others."""
    leaf, known = name.rpartition(".")[2], _settings(section)
    if alias := find_alias(name):
        return alias.text
    elsewhere = [other for other in _all_settings(model) if other.rpartition(".")[2] == leaf]
    hint = did_you_mean(leaf, known)
    if elsewhere and hint:
        return f"unknown setting here{hint}; known elsewhere: {', '.join(elsewhere)}"
    if elsewhere:
        return f"unknown setting here; write {' or '.join(elsewhere)} instead"
    return f"unknown setting{hint}; known: {', '.join(known)}"


def _one_of(setting: str, value: Any, known: Sequence[str]) -> str:
    hint = did_you_mean(str(value), known)
    return f"{setting}: {shown(value)} is not one of {', '.join(known)}{hint}"


def _inner_path(reason: str) -> tuple[SettingPath, str]:
    """Split the message of a section's validator, ``SETTING: text``, into path and text."""
    match = re.match(r"^([a-z_]+(?:\[\d+\])?(?:\.[a-z_]+)*): (.*)$", reason, flags=re.DOTALL)
    if match is None:
        return (), reason
    parts = re.findall(r"[^.\[\]]+", match[1])
    return tuple(int(part) if part.isdigit() else part for part in parts), match[2]


def _is_union_tag(part: str | int) -> bool:
    """Whether a path element is a type that pydantic tried for a union, not a setting."""
    return isinstance(part, str) and (part.startswith("literal[") or part in ("bool", "str", "int"))


def _union_values(model: type[BaseModel], path: SettingPath) -> list[str]:
    """List the valid values of a union of literals and bool."""
    annotation = _section(model, path[:-1]).model_fields[str(path[-1])].annotation
    values: list[str] = []
    for choice in get_args(annotation):
        values += ["true", "false"] if choice is bool else [str(v) for v in get_args(choice)]
    return values


def _settings(section: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in section.model_fields.items()]


def _all_settings(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of all settings, without list indices."""
    for name, field in section.model_fields.items():
        path = prefix + (field.alias or name)
        yield path
        for inner in _models(field.annotation):
            yield from _all_settings(inner, f"{path}.")


def _section(model: type[BaseModel], path: SettingPath) -> type[BaseModel]:
    for part in path:
        if isinstance(part, str):
            model = next(_models(model.model_fields[part].annotation))
    return model


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the models inside ``X``, ``X | None``, ``list[X]`` or ``Annotated[...]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)
