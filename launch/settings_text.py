"""Text of ``promptshard settings`` for terminals and pipes."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterator

import typer

from trainer.config.reference import Setting, SettingsSection, sections

#: Line width if the output is not a terminal, and maximum line width on a terminal.
PIPE_WIDTH, MAX_WIDTH = 80, 100
_NAMES = 26
#: Maximum length of a default's meaning that the overview prints beside the default.
_SHORT_MEANING = 24
_EMPTY = {"''": "empty", "[]": "empty list", "{}": "empty"}
_NO_BREAK = "\N{NO-BREAK SPACE}"

INTRODUCTION = (
    "Settings of the run file, by section; the default is in brackets. Details: promptshard "
    "settings NAME, where NAME is a section (prompts.init), a setting (learning_rate) or another "
    "trainer's name for one (lr)."
)


def output_width() -> int:
    """Return the number of columns to fill."""
    if not sys.stdout.isatty():
        return PIPE_WIDTH
    return min(shutil.get_terminal_size((PIPE_WIDTH, 24)).columns, MAX_WIDTH)


def overview(width: int) -> Iterator[str]:
    """Yield one line per setting, longer ones wrapped."""
    yield from wrap(INTRODUCTION, width)
    root, *others = sections().values()
    yield ""
    for setting in root.settings:
        if setting.name not in sections():
            yield from _columns(setting.name, _short(setting), width)
    for section in others:
        if section.like is None:
            yield ""
            mark = " [required]" if section.setting.required else ""
            yield from _heading(section.setting, width, mark)
            for setting in section.settings:
                yield from _columns(f"  {setting.leaf}", _short(setting), width)


def describe_section(section: SettingsSection, width: int) -> Iterator[str]:
    """Yield a section and the full entries of its settings."""
    yield from _heading(section.setting, width)
    about = section.about if section.like is None else (f"The settings of {section.like}.",)
    for paragraph in (section.setting.details, *about):
        yield from wrap(paragraph, width, 2)
    yield from _values(section.setting, width, 2)
    for setting in section.settings:
        yield ""
        yield from describe(setting, width)


def describe(setting: Setting, width: int) -> Iterator[str]:
    """Yield the full entry of a setting."""
    yield typer.style(setting.name, bold=True)
    yield from wrap(setting.summary, width, 4)
    yield from wrap(setting.details, width, 4)
    yield from wrap(f"type: {setting.type}", width, 4, hanging=6)
    if setting.required or setting.default is not None:
        yield f"    {'required' if setting.required else f'default: {setting.default}'}"
    yield from _values(setting, width, 6)
    if setting.name in sections():
        yield f"    details: promptshard settings {setting.name}"


def _values(setting: Setting, width: int, indent: int) -> Iterator[str]:
    values = setting.values or {}
    names = indent + 2 + max(map(len, values), default=0)
    for value, meaning in values.items():
        yield from _columns(" " * indent + value, meaning, width, names)


def _short(setting: Setting) -> str:
    """Return the first line of a setting's meaning, and its default in brackets."""
    default = "required" if setting.required else setting.default
    meaning = (setting.values or {}).get(str(default), "")
    if default is None:
        return setting.summary
    if meaning and len(meaning) <= _SHORT_MEANING:
        default = f"{default}: {meaning}"
    default = _EMPTY.get(default, default).replace(" ", _NO_BREAK)
    return f"{setting.summary} [{default}]"


def _heading(setting: Setting, width: int, mark: str = "") -> Iterator[str]:
    kind = " (a list)" if setting.type.startswith("list") else ""
    first, *rest = wrap(f"{setting.name}: {setting.summary}{kind}{mark}", width, hanging=2)
    yield typer.style(setting.name, bold=True) + first.removeprefix(setting.name)
    yield from rest


def _columns(name: str, text: str, width: int, names: int = _NAMES) -> Iterator[str]:
    """Yield a name and a text beside it; a name that is too long gets a line of its own."""
    lines = wrap(text, width, names) or [""]
    if len(name) + 2 > names:
        yield name
        yield from lines
    else:
        yield name.ljust(names) + lines[0].lstrip()
        yield from lines[1:]


def wrap(text: str, width: int, indent: int = 0, hanging: int | None = None) -> list[str]:
    lines = textwrap.wrap(
        text,
        width,
        initial_indent=" " * indent,
        subsequent_indent=" " * (indent if hanging is None else hanging),
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [line.replace(_NO_BREAK, " ") for line in lines]
