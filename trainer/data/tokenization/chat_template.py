"""Chat template of a tokenizer: dialogue -> text, with limits on time and size and a fixed date.

Needs a tokenizer, but no torch.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from trainer.data.column_parsers import content_of
from trainer.data.token_table import runs
from trainer.data.tokenization.cpu_limit import CpuLimitExceeded, cpu_limit
from trainer.runtime import atomic_io
from trainer.runtime.errors import BadInput
from trainer.runtime.json_file import parse_json

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]] | None

#: Maximum CPU time of a template for one dialogue.
CPU_SECONDS = 10.0
#: Limit of a template's output: the larger of this number and this multiple of the dialogue's size.
MAX_CHARACTERS, MAX_RATIO = 1_000_000, 20

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
#: Directives of strftime, and optional flags.
_DIRECTIVES, _FLAGS = "aAbBcCdDeFgGhHIjklmMnpPrRsStTuUVwWxXyYzZf", ("", "-", "_", "0", "^", "#")

#: File in a run's output folder with the date of its first start, which templates read.
CHAT_DATE = "chat-date.txt"

_DATE = "strftime_now"
_LITERAL_FORMAT = re.compile(r"strftime_now\(\s*(?:'[^'\\]*'|\"[^\"\\]*\")\s*\)")
#: Macro that replaces the function of the same name that transformers passes to templates.
_STRFTIME_NOW = (
    "{% macro strftime_now(format) -%}{% for text in format.split('%%') %}"
    "{% set filled = namespace(text=text) %}{% for name, value in VALUES %}"
    "{% set filled.text = filled.text.replace(name, value) %}{% endfor %}"
    "{{ filled.text if loop.first else '%' + filled.text }}{% endfor %}{%- endmacro +%}"
)


class TemplateLimitExceeded(Exception):
    """The template takes too long or writes too much, presumably for every dialogue."""


@dataclass(frozen=True)
class TokenSpan:
    """A marked part of a dialogue, as (start, stop) of tokens and of characters."""

    tokens: tuple[int, int]
    characters: tuple[int, int]


class ChatTemplate:
    """Writes dialogues exactly as transformers does, and tokenizes them.

    Args:
        tokenizer: a transformers tokenizer with a chat template.
        date: the date that templates read through ``strftime_now``; None: today.
        variables: ``tasks.chat_template_kwargs``.

    Raises:
        TemplateLimitExceeded: the template takes too long or writes too much.
    """

    def __init__(
        self,
        tokenizer: Any,
        date: datetime.date | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        self._tokenizer, self._date = tokenizer, date
        self._variables = dict(variables or {})
        self._reads_text, self._reads_parts = True, True
        self._unread_arguments: type | None = None
        self._reads_text, self._reads_parts = self._probe()
        self._unread_arguments = self._probe_arguments()

    def text(
        self, messages: Messages, tools: Tools = None, *, generation_prompt: bool = False
    ) -> str:
        """Write a dialogue as text.

        Args:
            messages: turns in the form of ``column_parsers.parse_messages``.
            generation_prompt: end with the beginning of a turn of the assistant.

        Raises:
            ValueError: the template rejects the dialogue.
            TemplateLimitExceeded: the template takes too long or writes too much.
        """
        text: str = self._apply(
            messages, tools, tokenize=False, add_generation_prompt=generation_prompt
        )
        if len(text) > MAX_CHARACTERS:
            given = len(json.dumps([list(messages), tools], default=str))
            if len(text) > MAX_RATIO * given:
                raise TemplateLimitExceeded(
                    f"writes {len(text):,} characters for a dialogue of {given:,}"
                )
        return text

    @property
    def sources(self) -> list[str]:
        """All chat templates of the tokenizer."""
        source = self._tokenizer.chat_template
        return list(source.values()) if isinstance(source, dict) else [source]

    def ids(self, text: str) -> list[int]:
        """Tokenize text that the template has written."""
        encoded = self._tokenizer(text, add_special_tokens=False, verbose=False)
        return list(encoded["input_ids"])

    def marked(self, messages: Messages, tools: Tools = None) -> list[TokenSpan] | None:
        """Return the spans inside ``{% generation %}``, in order; None without such marks.

        Raises as ``text``.
        """
        if not (self._tokenizer.is_fast and _GENERATION.search(self._source(tools))):
            return None
        encoded = self._apply(
            messages, tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        mask = list(encoded["assistant_masks"])
        for token in range(1, len(mask)):
            # If a mark ends with a character of several tokens, transformers marks only the first.
            if mask[token - 1] and not mask[token]:
                before, here = (encoded.token_to_chars(i) for i in (token - 1, token))
                mask[token] = int(before is not None and before == here)
        marks = []
        for start, stop in runs(mask):
            first, last = (encoded.token_to_chars(token) for token in (start, stop - 1))
            marks.append(TokenSpan((start, stop), (first.start, last.end)))
        return marks

    def begins_mark_after(self, start: int, messages: Messages, tools: Tools = None) -> bool:
        """Whether the last span inside ``{% generation %}`` begins after a number of characters.

        Faster than ``marked``, because nothing is tokenized. Raises as ``text``.
        """
        if not _GENERATION.search(source := self._source(tools)):
            return False
        options = self._tokenizer.special_tokens_map | self._options(source)
        with self._limited(messages):
            _, (spans,) = render_jinja_template(
                conversations=[[self._turn(turn) for turn in messages]],
                tools=tools,
                return_assistant_tokens_mask=True,
                **{"chat_template": source} | options,
            )
        return any(first > start for first, _ in spans[-1:])

    def _apply(self, messages: Messages, tools: Tools, **options: Any) -> Any:
        turns = [self._turn(turn) for turn in messages]
        options |= self._options(self._source(tools))
        with self._limited(messages):
            return self._tokenizer.apply_chat_template(turns, tools=tools, **options)

    def _options(self, source: str) -> dict[str, Any]:
        """Return the variables of a template, and the template that reads the fixed date."""
        if _DATE not in source:
            return dict(self._variables)
        dated = _with_date(source, self._date or datetime.date.today())
        return self._variables | {"chat_template": dated}

    @contextmanager
    def _limited(self, messages: Messages) -> Iterator[None]:
        """Limit the time of the template, and convert its errors."""
        try:
            with cpu_limit(CPU_SECONDS):
                yield
        except CpuLimitExceeded:
            raise TemplateLimitExceeded(f"takes more than {CPU_SECONDS:g} s of CPU time") from None
        except MemoryError:
            raise TemplateLimitExceeded("takes more memory than there is") from None
        except Exception as error:  # of Jinja, or raised by the template itself
            reason = str(error).strip().split("\n")[0]
            calls = next((i for i, turn in enumerate(messages) if "content" not in turn), None)
            if calls is not None:
                reason += (
                    f"; [{calls}] has tool_calls without content, which a template without tools "
                    "cannot write: use another base or base.chat_template"
                )
            raise ValueError(f"the chat template rejects this dialogue: {reason}") from None

    def _source(self, tools: Tools) -> str:
        source: str = self._tokenizer.get_chat_template(tools=tools)
        return source

    def _turn(self, turn: Mapping[str, Any]) -> dict[str, Any]:
        """Convert content and arguments to the form that the template reads; remove ``weight``."""
        kept = {key: value for key, value in turn.items() if key != "weight"}
        content = kept.get("content")
        if isinstance(content, list) and not self._reads_parts:
            kept["content"] = content_of(turn)
        elif isinstance(content, str) and not self._reads_text:
            kept["content"] = [{"type": "text", "text": content}]
        if self._unread_arguments is not None and isinstance(calls := kept.get("tool_calls"), list):
            kept["tool_calls"] = [_with_other_arguments(c, self._unread_arguments) for c in calls]
        return kept

    def _probe(self) -> tuple[bool, bool]:
        """Test whether the template reads content that is (text, a list of parts)."""
        probe = "one two three"
        as_text = self._try(probe)
        as_parts = self._try([{"type": "text", "text": probe}])
        if probe in as_text:
            return True, as_parts == as_text
        return probe not in as_parts, probe in as_parts

    def _probe_arguments(self) -> type | None:
        """Test whether the template reads arguments of tool calls as objects and as JSON text.

        Return the form that it does not read; None if it reads both, or writes no call.
        """
        probe = {"one": "two"}

        def written(arguments: Any) -> str:
            function = {"name": "f", "arguments": arguments}
            call = {"type": "function", "id": "callcall0", "function": function}
            return self._try("x", {"role": "assistant", "content": "", "tool_calls": [call]})

        as_object, as_text = written(probe), written(json.dumps(probe))
        reads_object = as_object != "" and repr(probe) not in as_object
        # Text that is written as JSON again has escaped quotes.
        reads_text = json.dumps(probe) in as_text or (as_text != "" and as_text == as_object)
        if reads_object == reads_text:
            return None
        return str if reads_object else dict

    def _try(self, content: Any, *answer: Mapping[str, Any]) -> str:
        try:
            return self.text([{"role": "user", "content": content}, *answer])
        except ValueError:
            return ""


def _with_other_arguments(call: Any, unread: type) -> Any:
    """Convert arguments of a tool call of type ``unread``, an object or JSON text, to the other."""
    function = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), unread):
        return call
    arguments = function["arguments"]
    if isinstance(arguments, str):
        try:
            other = parse_json(arguments)
        except ValueError:
            return call
    else:
        other = json.dumps(arguments, ensure_ascii=False)
    converted = {**function, "arguments": other}
    return {**call, "function": converted} if "function" in call else converted


def reads_date(tokenizer: Any) -> bool:
    """Whether a chat template of the tokenizer reads the date."""
    return _DATE in str(getattr(tokenizer, "chat_template", None))


def dated_template(tokenizer: Any, date: datetime.date | None) -> str | None:
    """Return the tokenizer's chat template reading ``date``; None if it does not read the date."""
    source = tokenizer.chat_template
    if not isinstance(source, str) or date is None or not reads_date(tokenizer):
        return None
    return _with_date(source, date)


@cache
def _with_date(source: str, date: datetime.date) -> str:
    """Add the macro to a template that makes it read midnight of ``date`` as the current time."""
    time = datetime.datetime.combine(date, datetime.time())
    names = [f"%{flag}{directive}" for directive in _DIRECTIVES for flag in _FLAGS]
    if len(_LITERAL_FORMAT.findall(source)) == source.count(f"{_DATE}("):
        names = [name for name in names if name in source]  # the macro tries every name
    values = [(name, time.strftime(name)) for name in names]
    return _STRFTIME_NOW.replace("VALUES", repr(values)) + source


def read_chat_date(output: Path) -> datetime.date | None:
    """Read the stored date of a run, or None; raises ``BadInput`` if the file is damaged."""
    path = output / CHAT_DATE
    try:
        return datetime.date.fromisoformat(path.read_text().strip())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise BadInput(
            f"{path}: cannot be read ({error}); write the date of the run's first start, as "
            "2026-01-31"
        ) from None


def keep_chat_date(output: Path, date: datetime.date) -> None:
    """Store the date for later starts and for generation."""
    atomic_io.write(output / CHAT_DATE, f"{date.isoformat()}\n")
