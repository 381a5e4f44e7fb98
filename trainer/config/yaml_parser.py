"""Parse the core schema of YAML 1.2, with limits and the line of every value. Imports no torch.

PyYAML reads YAML 1.1, where ``no`` is false, ``010`` is 8 and ``1:30`` is 90. This module reads:

    null        null ~ or nothing
    boolean     true false
    integer     12 -3 0x1f 0o17
    number      0.5 .5 1e3 .inf .nan
    text        everything else, including yes, no, on, off, dates and 1:30

Refused are numbers that YAML 1.1 and 1.2 read differently (010), digits with underscores (1_000),
tags of other types, aliases inside their own anchor, and documents that are too large (also after
expanding aliases) or too deeply nested.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml

from trainer.config.yaml_scalars import (
    FLOAT,
    INT,
    NULL,
    TAG,
    UNCLEAR,
    plain_value,
    shown,
    tagged_value,
)

SettingPath = tuple[str | int, ...]

MAX_BYTES = 1 << 22
MAX_DEPTH = 40
#: Maximum number of values and keys, with aliases expanded.
MAX_NODES = 100_000
#: Reasons of libyaml that do not name a remedy.
_REMEDIES = {
    "found character that cannot start any token": "put a text that begins with a special "
    "character, such as % or @, in quotes",
    "mapping values are not allowed in this context": "put a text with a colon in quotes, or "
    "correct the indentation",
    "did not find expected key": "put a text with braces, brackets or quotes in double quotes, or "
    "correct the indentation",
    "found unknown escape character": "use single quotes, or write a backslash twice",
    "found unexpected end of stream": "close the quotes",
    "did not find expected alphabetic or numeric character": "put a text that begins with * or & "
    "in quotes",
}


class YamlError(ValueError):
    """The text is not valid YAML, or exceeds a limit of this module.

    ``problems`` are (path, line from 1 or None, mistake and remedy).
    """

    def __init__(self, problems: list[tuple[SettingPath, int | None, str]]) -> None:
        self.problems = problems
        super().__init__("; ".join(text for _, _, text in problems))


@dataclass(frozen=True)
class Document:
    """A parsed document.

    Attributes:
        data: mappings with text keys, lists, text, numbers, booleans and None.
        lines: path of a value -> line, from 1, of its key or list item.
    """

    data: Any
    lines: dict[SettingPath, int]


def parse(
    text: str,
    path: SettingPath = (),
    is_text: Callable[[SettingPath], bool] = lambda path: False,
) -> Document:
    """Parse one document.

    Args:
        path: path of the document's value in the run file, for ``is_text`` and messages.
        is_text: whether the value at a path is always text, such as ``1.10`` in a list of choices.

    Raises:
        YamlError: with every problem, or only the first one if parsing cannot continue.
    """
    return _resolve(_compose(text, path), path, is_text)


def parse_argument(
    text: str,
    path: SettingPath = (),
    is_text: Callable[[SettingPath], bool] = lambda path: False,
) -> Document:
    """Parse a value of the command line, as ``parse``.

    A text without quotes is the whole argument: `` #`` begins no comment in it, and its line breaks
    are kept. Raises ``YamlError`` for a comment after another value.
    """
    root = _compose(text, path)
    if root.plain:
        root.text = text.strip()
    elif (rest := text[root.end :].strip()).startswith("#"):
        quoted = "put the whole value in quotes, or remove the comment"
        raise YamlError([(path, None, f"{shown(rest)} is a comment in YAML; {quoted}")])
    return _resolve(root, path, is_text)


def _resolve(root: _Node, path: SettingPath, is_text: Callable[[SettingPath], bool]) -> Document:
    reader = _Resolver(is_text)
    data = reader.resolve(root, path, 0)
    if reader.problems:
        raise YamlError(reader.problems)
    return Document(data, reader.lines)


def dump(value: Any, *, one_line: bool = False) -> str:
    """Format plain data as YAML that this module and readers of YAML 1.1 parse to equal data."""
    text: str = yaml.dump(
        value,
        Dumper=_OneLineDumper if one_line else _Dumper,
        sort_keys=False,
        allow_unicode=True,
        default_flow_style=one_line,
        width=sys.maxsize if one_line else None,
    )
    return text.removesuffix("\n").removesuffix("\n...") if one_line else text


@dataclass
class _Node:
    """A value as written; an alias refers to the same node as its anchor."""

    line: int
    tag: str | None = None
    text: str | None = None  # of a scalar
    plain: bool = False  # a scalar without quotes and tag
    items: list[_Node] | None = None
    pairs: list[tuple[_Node, _Node]] | None = None
    end: int = 0  # index of the character after the value
    open: bool = field(default=True, repr=False)


def _compose(text: str, path: SettingPath) -> _Node:
    """Parse a text to nodes, event by event: deep nesting causes no deep recursion."""
    if len(text) > MAX_BYTES:
        raise YamlError([(path, None, f"is longer than {MAX_BYTES:,} characters")])
    if bad := re.search("[\ud800-\udfff]", text):
        line = text.count("\n", 0, bad.start()) + 1
        raise YamlError([(path, line, f"holds half a character, {bad[0]!a}")])
    try:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        return _tree(yaml.parse(text, Loader=loader))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        remedy = _REMEDIES.get(reason)
        if mark and re.match(r" *\t", "".join(text.split("\n")[mark.line : mark.line + 1])):
            remedy = "indent with spaces, not with tabs"
        reason += f"; {remedy}" if remedy else ""
        raise _invalid(mark.line + 1 if mark else None, reason) from None


def _invalid(line: int | None, reason: str) -> YamlError:
    return YamlError([((), line, f"not valid YAML: {reason}")])


def _tree(events: Iterator[Any]) -> _Node:
    root: _Node | None = None
    stack: list[_Node] = []
    keys: list[_Node | None] = []  # key of each open mapping that still has no value
    anchors: dict[str, _Node] = {}
    for count, event in enumerate(events):
        line, end = event.start_mark.line + 1, event.end_mark.index
        if count > 2 * MAX_NODES:
            raise YamlError([((), line, f"more than {MAX_NODES:,} values; use a smaller file")])
        if isinstance(event, yaml.CollectionEndEvent):
            closed = stack.pop()
            closed.open, closed.end = False, end
            keys.pop()
            continue
        if isinstance(event, yaml.AliasEvent):
            node = anchors.get(str(event.anchor))
            if node is None or node.open:
                what = "is not defined" if node is None else "is used inside itself"
                raise _invalid(line, f"alias *{event.anchor} {what}")
        elif isinstance(event, yaml.NodeEvent):
            node = _node(event, line)
            node.end = end
            if event.anchor is not None:
                anchors[event.anchor] = node
        elif isinstance(event, yaml.DocumentStartEvent) and root is not None:
            raise _invalid(line, "a second document begins; use one file for each")
        else:
            continue
        root = root or node
        if stack:
            _put(stack[-1], keys, node)
        if isinstance(event, yaml.CollectionStartEvent):
            stack.append(node)
            keys.append(None)
            if len(stack) > MAX_DEPTH:
                raise _invalid(line, f"nested deeper than {MAX_DEPTH} levels")
    return root or _Node(1, text="", plain=True)


def _node(event: Any, line: int) -> _Node:
    tag = None if event.tag in (None, "!") else event.tag
    if isinstance(event, yaml.ScalarEvent):
        plain = tag is None and event.tag is None and not event.style
        return _Node(line, tag, event.value, plain, open=False)
    if isinstance(event, yaml.SequenceStartEvent):
        return _Node(line, tag, items=[])
    return _Node(line, tag, pairs=[])


def _put(parent: _Node, keys: list[_Node | None], node: _Node) -> None:
    key = keys[-1]
    if parent.items is not None:
        parent.items.append(node)
    elif key is None:
        keys[-1] = node
    else:
        assert parent.pairs is not None
        parent.pairs.append((key, node))
        keys[-1] = None


def _is_merge(key: _Node) -> bool:
    return key.text == "<<" and key.plain


class _Resolver:
    """Converts nodes to data, aliases to copies; collects problems and lines."""

    def __init__(self, is_text: Callable[[SettingPath], bool]) -> None:
        self.lines: dict[SettingPath, int] = {}
        self.problems: list[tuple[SettingPath, int | None, str]] = []
        self._is_text = is_text
        self._count = 0

    def resolve(self, node: _Node, path: SettingPath, depth: int) -> Any:
        self._count += 1
        if self._count > MAX_NODES or depth > MAX_DEPTH:
            limit = f"{MAX_NODES:,} values" if self._count > MAX_NODES else f"{MAX_DEPTH} levels"
            raise _invalid(node.line, f"its aliases make more than {limit}; write less of them")
        self.lines.setdefault(path, node.line)
        if node.items is not None:
            self._check_tag(node, path, "seq")
            return [self.resolve(item, (*path, i), depth + 1) for i, item in enumerate(node.items)]
        if node.pairs is not None:
            self._check_tag(node, path, "map")
            return self._mapping(node.pairs, path, depth)
        return self._scalar(node, path)

    def _check_tag(self, node: _Node, path: SettingPath, own: str) -> None:
        if node.tag not in (None, TAG + own):
            self._problem(node, path, f"tag {shown(node.tag)} is not supported; remove it")

    def _problem(self, node: _Node, path: SettingPath, text: str) -> None:
        self.problems.append((path, node.line, text))

    def _mapping(
        self, pairs: list[tuple[_Node, _Node]], path: SettingPath, depth: int
    ) -> dict[str, Any]:
        settings: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        # Merged settings first, so that the lines of the others replace those of their anchors.
        for key, value in sorted(pairs, key=lambda pair: not _is_merge(pair[0])):
            if key.text is None:
                self._problem(
                    key,
                    path,
                    "a key must be text, not a list or mapping; put a text with braces in quotes",
                )
            elif _is_merge(key):
                for name, item in self._merged(value, path, depth).items():
                    merged.setdefault(name, item)
            elif key.text in settings:
                self._problem(key, (*path, key.text), "duplicate key; remove one")
            else:
                inner = (*path, key.text)
                self.lines[inner] = key.line
                settings[key.text] = self.resolve(value, inner, depth + 1)
        return {**{name: item for name, item in merged.items() if name not in settings}, **settings}

    def _merged(self, node: _Node, path: SettingPath, depth: int) -> dict[str, Any]:
        """Return the settings that ``<<`` merges from one mapping or a list of mappings."""
        value = self.resolve(node, path, depth + 1)
        settings: dict[str, Any] = {}
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, dict):
                settings = {**item, **settings}
            else:
                self._problem(node, path, "<< takes a mapping, as <<: *defaults")
        return settings

    def _scalar(self, node: _Node, path: SettingPath) -> Any:
        assert node.text is not None
        try:
            if self._is_text(path) and node.plain and not NULL.fullmatch(node.text):
                return node.text
            return plain_value(node.text) if node.plain else tagged_value(node.tag, node.text)
        except ValueError as error:
            self._problem(node, path, str(error))
            return None


class _Dumper(yaml.SafeDumper):
    """Quotes texts that YAML 1.1 or the core schema would parse as another type."""


_Dumper.add_implicit_resolver(TAG + "int", re.compile(rf"(?:{UNCLEAR.pattern})$"), None)
_Dumper.add_implicit_resolver(TAG + "int", re.compile(rf"(?:{INT.pattern})$"), None)
_Dumper.add_implicit_resolver(TAG + "float", re.compile(rf"(?:{FLOAT.pattern})$"), None)


class _OneLineDumper(_Dumper):
    """Also escapes newlines."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Escape line breaks that only one YAML version recognizes; this requires double quotes."""
    breaks = (
        "[\n\r\x85\u2028\u2029]" if isinstance(dumper, _OneLineDumper) else "[\r\x85\u2028\u2029]"
    )
    style = '"' if re.search(breaks, text) else None
    return dumper.represent_scalar(TAG + "str", text, style=style)


_Dumper.add_representer(str, _represent_text)
_OneLineDumper.add_representer(str, _represent_text)
