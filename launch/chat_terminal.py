"""Read messages and show answers: on a terminal with editing, otherwise as plain lines."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from trainer.runtime.errors import BadInput
from trainer.runtime.redact import printable

#: Words that follow a command; prompts follow the others.
_FOLLOWING = {"/template": ("chat", "task"), "/save": (), "/system": ()}


class View(Protocol):
    """Shows answers while they are generated."""

    def add(self, name: str, text: str) -> None:
        """Add text to the answer of a prompt."""


class ChatTerminal:
    """The terminal, or the pipes, of a chat.

    Args:
        commands: words that begin a line, such as ``/use``.
        prompts: names that follow them.

    Raises:
        BadInput: stdin is a terminal, and the library to edit lines is not installed.
    """

    def __init__(self, commands: Sequence[str], prompts: Sequence[str]) -> None:
        self.is_interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self._session: Any = None
        self._console = Console(highlight=False)
        if not self.is_interactive:
            return
        if importlib.util.find_spec("prompt_toolkit") is None:
            raise BadInput(
                "chat: needs prompt_toolkit on a terminal; run pip install 'promptshard[chat]'"
            )
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import DynamicCompleter, WordCompleter

        def completer() -> WordCompleter:
            words = self._session.default_buffer.document.text_before_cursor.split(" ")
            known = list(commands) if len(words) == 1 else _FOLLOWING.get(words[0], prompts)
            return WordCompleter(list(known), WORD=True)

        self._session = PromptSession(
            completer=DynamicCompleter(completer), complete_while_typing=False
        )

    def read(self, prompt: str) -> str | None:
        """Return the next line; None at the end of the input.

        Raises:
            KeyboardInterrupt: Ctrl-C.
        """
        if self._session is None:
            line = sys.stdin.readline()
            return line.rstrip("\n") if line else None
        try:
            line = self._session.prompt(f"{prompt}> ")
        except EOFError:
            return None
        return str(line)

    def note(self, text: str) -> None:
        """Show a remark that is not an answer."""
        Console(stderr=True, highlight=False, soft_wrap=True).print(
            Text(printable(text), style="dim")
        )

    @contextmanager
    def answers(self, names: Sequence[str]) -> Iterator[View]:
        """Show the answer of one prompt as it comes, or those of several side by side."""
        view: _Words | _Columns
        if len(names) == 1:
            view = _Words(self._console.file)
        else:
            view = _Columns(names, self._console, live=self.is_interactive)
        try:
            yield view
        finally:
            view.end()


class _Words:
    """Writes one answer word by word."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def add(self, name: str, text: str) -> None:
        self._stream.write(_lines(text) if self._stream.isatty() else text)
        self._stream.flush()

    def end(self) -> None:
        self._stream.write("\n")
        self._stream.flush()


class _Columns:
    """Shows several answers: on a terminal side by side, otherwise one below the other."""

    def __init__(self, names: Sequence[str], console: Console, *, live: bool) -> None:
        self._texts = dict.fromkeys(names, "")
        self._console = console
        self._live = Live(console=console, auto_refresh=False) if live else None
        if self._live is not None:
            self._live.start()

    def add(self, name: str, text: str) -> None:
        self._texts[name] += text
        if self._live is not None:
            self._live.update(_side_by_side(self._texts), refresh=True)

    def end(self) -> None:
        if self._live is not None:
            self._live.stop()
            return
        for name, text in self._texts.items():
            self._console.file.write(f"{name}: {text}\n")
        self._console.file.flush()


def _side_by_side(texts: Mapping[str, str]) -> Table:
    table = Table(expand=True)
    for name in texts:
        table.add_column(Text(printable(name)), ratio=1)
    table.add_row(*(Text(_lines(text)) for text in texts.values()))
    return table


def _lines(text: str) -> str:
    """Make every line of a text safe for a terminal; line breaks stay."""
    return "\n".join(map(printable, text.split("\n")))
