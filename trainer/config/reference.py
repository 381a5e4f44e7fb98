"""Reference of all settings of the run file, read from its JSON schema. Imports no torch.

``sections`` lists them in the order of the run file; ``find`` looks a name up, also with the index
or the name of an item (``prompts[0].init``, ``prompts.short.seed``), without its section
(``learning_rate``), or under the name that another trainer uses (``lr``).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from trainer.config import aliases, sweep, yaml_parser
from trainer.config.init import SHORT_FORMS
from trainer.config.schema import run_file_schema
from trainer.runtime.errors import BadInput, did_you_mean

#: What can be written instead of a mapping.
_SHORT = {
    "prompts.init": f"Short form: one of {', '.join(SHORT_FORMS)}; init: vocab is {{vocab: true}}.",
    "tasks.train": "Short form: a path, or hf://NAME for a hub dataset; or a list of sources.",
}
#: Words for texts of a certain form.
_TEXTS = {
    "path": "path",
    "name": "name of letters, digits and . _ -",
    "size": "auto or a size such as 24GB",
    "source": "path or hf://NAME",
}


@dataclass(frozen=True)
class Setting:
    """One setting of the run file.

    Attributes:
        name: dotted name without list indices, such as ``prompts.init.text``.
        type: its values in words.
        default: as in the run file; None if the setting is required or a section.
        summary: its meaning in one line.
        details: further sentences about it.
        values: meaning of single values, such as ``auto`` or ``null``.
    """

    name: str
    type: str
    default: str | None
    required: bool
    summary: str
    details: str = ""
    values: Mapping[str, str] | None = None

    @property
    def leaf(self) -> str:
        return self.name.rpartition(".")[2]


@dataclass(frozen=True)
class SettingsSection:
    """A section of the run file.

    Attributes:
        setting: the section itself; its name is empty for the whole file.
        about: paragraphs about the section.
        settings: its own settings, subsections included.
        like: name of the section with the same settings, which are listed there only.
    """

    setting: Setting
    about: tuple[str, ...]
    settings: tuple[Setting, ...]
    like: str | None = None


@functools.cache
def sections() -> dict[str, SettingsSection]:
    """Return all sections by name, in the order of the run file; ``""`` is the whole file."""
    schema = run_file_schema()
    return {section.setting.name: section for section in _Reader(schema).read()}


def settings() -> dict[str, Setting]:
    """Return all settings and sections by name, in the order of the run file."""
    return {s.name: s for section in sections().values() for s in section.settings}


class _Reader:
    """Reads the sections of a JSON schema."""

    def __init__(self, schema: Mapping[str, Any]) -> None:
        self._schema = schema
        self._first: dict[int, str] = {}  # id of a section's schema -> name of its first use

    def read(self) -> Iterator[SettingsSection]:
        root = Setting("", "mapping", None, True, "the run file")
        yield from self._section(root, self._schema)

    def _section(self, setting: Setting, node: Mapping[str, Any]) -> Iterator[SettingsSection]:
        prefix = f"{setting.name}." if setting.name else ""
        required = node.get("required", [])
        if setting.name == "prompts":
            required = [*required, "task"]  # in the schema: unless a sweep names the tasks
        own, inner = [], []
        for key, field in node["properties"].items():
            name = prefix + key
            if setting.name == "prompts.sweep" and key not in sweep.HOW:
                continue
            section = None if setting.name == "prompts.sweep" else self._find_section(field)
            own.append(self._setting(name, field, section, key in required))
            if section is not None:
                inner.append((own[-1], section))
        # The first paragraph of a section's docstring is also the description of its setting.
        about = str(node.get("description", "")).split("\n")[1:] if setting.name else []
        about += [_SHORT[setting.name]] if setting.name in _SHORT else []
        yield SettingsSection(setting, tuple(text for text in about if text), tuple(own))
        for child, section in inner:
            first = self._first.setdefault(id(section), child.name)
            if first == child.name:
                yield from self._section(child, section)
            else:
                yield SettingsSection(child, (), (), like=first)

    def _setting(
        self, name: str, field: Mapping[str, Any], section: Any, required: bool
    ) -> Setting:
        text = field.get("description") or (section or {}).get("description", "")
        summary, details, values = _read_description(text)
        default = None if required else _default(field)
        return Setting(name, self._words(field), default, required, summary, details, values)

    def _resolve(self, node: Mapping[str, Any]) -> Mapping[str, Any]:
        while "$ref" in node:
            target: Any = self._schema
            for part in node["$ref"].removeprefix("#/").split("/"):
                target = target[part]
            node = target
        return node

    def _find_section(self, node: Mapping[str, Any]) -> Mapping[str, Any] | None:
        """Return the mapping with fixed keys inside a setting's schema, if any."""
        node = self._resolve(node)
        if "properties" in node and "type" in node:
            return node
        inner = [*node.get("anyOf", []), *([node["items"]] if "items" in node else [])]
        candidates = (self._find_section(part) for part in inner)
        return next((section for section in candidates if section is not None), None)

    def _words(self, node: Mapping[str, Any]) -> str:
        return _join(list(dict.fromkeys(self._alternatives(node))))

    def _alternatives(self, node: Mapping[str, Any]) -> Iterator[str]:
        """Yield the values that a setting can have, null last."""
        parts = [] if "type" in node else node.get("anyOf", [])
        for part in parts:
            if part.get("type") == "array" and part.get("items") in parts:
                yield "list of these"
            else:
                yield from self._alternatives(part)
        if "$ref" in node:
            yield from self._alternatives(self._resolve(node))
        elif "enum" in node:
            yield from map(str, node["enum"])
        elif "const" in node:
            yield str(node["const"])
        elif node.get("type") == "boolean":
            yield from ("true", "false")
        elif "type" in node:
            yield self._words_of_type(node)

    def _words_of_type(self, node: Mapping[str, Any]) -> str:
        kind = node["type"]
        if kind == "array" and "prefixItems" in node:
            items = node["prefixItems"]
            return f"list of {len(items)} {_plural(self._words(items[0]))}"
        if kind == "array":
            return f"list of {_plural(self._words(node['items']))}"
        if kind == "string" or "string" in kind:
            return _TEXTS.get(node.get("format", ""), "text")
        return _TYPES[kind] + _range(node)


_TYPES = {
    "integer": "integer",
    "number": "number",
    "null": "null",
    "object": "mapping",
}


def _plural(words: str) -> str:
    return re.sub(r"^(text|path|name|mapping|number|integer)\b", r"\1s", words)


def _join(words: list[str]) -> str:
    if len(words) > 2 and words[-1] == "null":
        return f"{_join(words[:-1])}; or null"
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"


def _range(node: Mapping[str, Any]) -> str:
    low, above = node.get("minimum"), node.get("exclusiveMinimum")
    high, below = node.get("maximum"), node.get("exclusiveMaximum")
    if above == 0 and node["type"] == "integer":
        low, above = 1, None
    if high is not None or below is not None:
        return f" from {low:g} to " + (f"{high:g}" if below is None else f"below {below:g}")
    if above is not None:
        return f" above {above:g}"
    return f" of at least {low:g}" if low is not None else ""


def _default(field: Mapping[str, Any]) -> str | None:
    if "default" not in field:
        return None
    return yaml_parser.dump(field["default"], one_line=True)


def _read_description(text: str) -> tuple[str, str, dict[str, str]]:
    """Split a description into its first line, its sentences and its ``VALUE: meaning`` lines."""
    summary, *rest = text.split("\n")
    values = [line for line in rest if re.match(r"[a-z0-9_]+: ", line)]
    details = " ".join(line for line in rest if line not in values)
    return summary, details, dict(line.split(": ", 1) for line in values)


def find(name: str) -> tuple[list[str], str | None]:
    """Look up settings by a name, or by one of their values.

    Returns:
        The names of the settings or sections that match, and a sentence if the name is another
        trainer's or a value.

    Raises:
        BadInput: nothing matches.
    """
    known = settings()
    query = _normalized(name)
    matches = [other for other in known if f".{other}".endswith(f".{query}")]
    if matches:
        return [query] if query in matches else matches, None
    if alias := aliases.find_alias(query):
        closest = alias.setting or alias.see
        return [closest] if closest else [], f"{name}: {alias.text}"
    matches = [other for other, setting in known.items() if query in (setting.values or {})]
    if matches and query not in ("null", "auto", "true", "false"):
        return matches, f"{name} is a value of {_join(matches)}"
    leaf = query.rpartition(".")[2]
    hint = did_you_mean(query, list(known)) if "." in query else ""
    hint = hint or did_you_mean(leaf, [*(s.leaf for s in known.values()), *aliases.all_aliases()])
    raise BadInput(f"{name!r}: unknown setting{hint}; `promptshard settings` lists all")


def _normalized(name: str) -> str:
    """Return a name without indices and names of items; in a section like another, in that one."""
    query = re.sub(r"\[[^\]]*\]", "", name.strip()).strip(".").lower().replace("-", "_")
    for section in sections().values():
        prefix = f"{section.setting.name}."
        if section.like and query.startswith(prefix):
            return f"{section.like}.{query.removeprefix(prefix)}"
    # prompts.NAME.seed, as in an override
    section_name, *inner = query.split(".")
    if section_name in ("tasks", "prompts") and len(inner) > 1 and query not in settings():
        without_name = ".".join([section_name, *inner[1:]])
        return without_name if without_name in settings() else query
    return query
