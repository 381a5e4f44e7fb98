"""The run file and its ``key=value`` overrides as plain data with the origin of every value.

Imports no torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.config import yaml_parser
from trainer.config.yaml_parser import SettingPath, YamlError
from trainer.runtime.errors import BadInput, did_you_mean
from trainer.runtime.redact import redact_value

#: Maximum number of problems of a run file that are reported.
MOST_PROBLEMS = 100


@dataclass
class YamlSource:
    """Data of a run file after its overrides, with the origin of each setting.

    Attributes:
        lines, overrides: path as written -> line in the file, or text of the override.
        moved: path in the data -> path as written, for settings that the expansion of sweeps has
            moved.
    """

    file: str
    data: dict[str, Any]
    lines: Mapping[SettingPath, int]
    overrides: dict[SettingPath, str] = field(default_factory=dict)
    moved: Mapping[SettingPath, SettingPath] = field(default_factory=dict)

    def written(self, path: SettingPath) -> SettingPath:
        """Return the path at which the user wrote a setting of ``data``."""
        for n in range(len(path), 0, -1):
            if path[:n] in self.moved:
                return (*self.moved[path[:n]], *path[n:])
        return path

    def where(self, path: SettingPath) -> str:
        """Return ``FILE:LINE`` of a path as written, or the override that set its value."""
        prefixes = [path[:n] for n in range(len(path), 0, -1)]
        for prefix in prefixes:
            if prefix in self.overrides:
                return f"override {_cut(self.overrides[prefix])}"
        if path not in self.lines:  # a section that only exists because of an override
            for deeper, override in self.overrides.items():
                if path and deeper[: len(path)] == path:
                    return f"override {_cut(override)}"
        for prefix in prefixes:
            if prefix in self.lines:
                return f"{self.file}:{self.lines[prefix]}"
        return self.file


def read(path: Path, overrides: Sequence[str] = ()) -> YamlSource:
    """Read a run file and apply ``key=value`` overrides, in order.

    Raises:
        BadInput: the file cannot be read, is not valid YAML or gives a setting twice; or with every
            override that is not valid.
    """
    try:
        document = yaml_parser.parse(_read_text(path), is_text=_is_text)
    except YamlError as error:
        raise BadInput(
            f"{path}{f':{line}' if line else ''}: {_named(where)}{text}"
            for where, line, text in error.problems[:MOST_PROBLEMS]
        ) from None
    if not isinstance(document.data, dict):
        raise BadInput(
            f"{path}: a run file is a mapping of settings; `promptshard init` writes one"
        )
    return override(YamlSource(str(path), document.data, document.lines), overrides)


def value_of(key: str, text: str) -> Any:
    """Parse the value of ``KEY=VALUE``, which is YAML as in the run file; raises ``YamlError``."""
    parts: list[str | int] = list(_parts(key))
    return yaml_parser.parse_argument(text, tuple(parts), _is_text).data


def saved(path: Path) -> dict[str, Any]:
    """Read the run file that a run saved; empty if it is missing or damaged."""
    try:
        data = yaml_parser.parse(_read_text(path)).data
    except (BadInput, YamlError):
        return {}
    return data if isinstance(data, dict) else {}


def override(source: YamlSource, overrides: Sequence[str]) -> YamlSource:
    """Apply ``key=value`` overrides in order, and record them in ``source.overrides``.

    Raises ``BadInput`` with every override that is not valid.
    """
    problems = []
    for text in overrides:
        try:
            source.overrides[_apply(source.data, text)] = text
        except BadInput as error:
            problems += error.problems
    if problems:
        raise BadInput(problems)
    return source


def dotted(path: SettingPath) -> str:
    """Format a path as in the run file: ``prompts[0].init.text``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _is_text(path: SettingPath) -> bool:
    """Whether a value is text exactly as written: 01, 1.10 or no in a list of choices."""
    return len(path) > 3 and path[0] == "tasks" and path[2] == "choices"


def _named(path: SettingPath) -> str:
    return f"{dotted(path)}: " if path else ""


def _read_text(path: Path) -> str:
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise BadInput(f"{path}: is a pipe or device; save the run file, it is read repeatedly")
        with path.open("rb") as stream:
            data = stream.read(yaml_parser.MAX_BYTES + 1)
        if len(data) > yaml_parser.MAX_BYTES:
            raise BadInput(
                f"{path}: is larger than {yaml_parser.MAX_BYTES:,} bytes; name a run file"
            )
        return data.decode("utf-8")
    except FileNotFoundError:
        raise BadInput(f"{path}: no such run file; `promptshard init` writes one") from None
    except IsADirectoryError:
        raise BadInput(f"{path}: is a folder; name the run file (YAML)") from None
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    except OSError as error:
        raise BadInput(f"{path}: cannot be read: {error.strerror}") from None
    except BadInput:
        raise
    except ValueError as error:  # a NUL byte in the path
        raise BadInput(f"{str(path)!r}: cannot be read: {error}") from None


def _parts(key: str) -> list[str]:
    return re.findall(r"[^.\[\]]+", key)


def _apply(data: dict[str, Any], override: str) -> SettingPath:
    """Apply one override ``a.b[0].c=value``; return the path of the setting.

    The value is YAML, but a text without quotes may contain `` #``.

    List items are addressed by index or, in ``tasks`` and ``prompts``, by name.
    """
    key, equals, value = override.partition("=")
    parts = _parts(key)
    if not equals or not parts:
        raise BadInput(
            f"{_cut(override)}: an override is written key=value, for example training.steps=100"
        )
    target: Any = data
    path: list[str | int] = []
    while parts:
        at, parts = _key(target, parts, override, path)
        path.append(at)
        if parts:
            if isinstance(target, dict) and target.get(at) is None:
                target[at] = {}
            target = target[at]
    try:
        target[at] = yaml_parser.parse_argument(value, tuple(path), _is_text).data
    except YamlError as error:
        raise BadInput(
            f"{_cut(override)}: the value is not valid YAML; quote it"
            if text.startswith("not valid YAML")
            else f"{_cut(override)}: {_named(where)}{text}"
            for where, _, text in error.problems
        ) from None
    return tuple(path)


def _key(
    target: Any, parts: list[str], override: str, path: Sequence[str | int]
) -> tuple[str | int, list[str]]:
    """Return the key of a mapping, or the index in a list, that parts begin with; and the rest.

    Args:
        parts: of the override's key, divided at dots, which the name of an item may contain.
        path: of ``target``.
    """
    name, rest = parts[0], parts[1:]
    if isinstance(target, dict):
        return name, rest
    if not isinstance(target, list):
        setting = dotted(tuple(path))
        raise BadInput(
            f"{_cut(override)}: {setting} is a single value in this run file, without {name!r}; "
            f"override {setting} itself"
        )
    items = [str(item.get("name")) if isinstance(item, dict) else "" for item in target]
    for length in range(len(parts), 0, -1):
        if (joined := ".".join(parts[:length])) in items:
            return items.index(joined), parts[length:]
    if re.fullmatch(r"[0-9]{1,9}", name) and int(name) < len(target):
        return int(name), rest
    names = list(filter(None, items))
    raise BadInput(
        f"{_cut(override)}: no item {name!r}{did_you_mean(name, names)}; known: {', '.join(names)}"
    )


def _cut(override: str) -> str:
    """Quote an override for a message, redacted and shortened."""
    return shown(redact_value(override), 200)


def shown(value: Any, width: int = 80) -> str:
    """Format a value for a message: null, true and false as in YAML, others as in Python."""
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= width else text[: width - 3] + "..."
