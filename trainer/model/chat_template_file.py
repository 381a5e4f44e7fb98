"""Read and check the file of ``base.chat_template``. Imports neither torch nor transformers."""

from __future__ import annotations

from pathlib import Path

from jinja2 import TemplateSyntaxError

from trainer.config import resolve_path
from trainer.data.tokenization.template_syntax import environment
from trainer.runtime.errors import BadInput
from trainer.runtime.redact import printable

#: Maximum size of a template. The largest known ones have 20 kB.
MAX_BYTES = 1 << 20


def read_chat_template(setting: str) -> str:
    """Read a Jinja file and check its syntax as transformers parses it.

    Args:
        setting: value of ``base.chat_template``.

    Raises:
        BadInput: the file is missing, not text, too large, empty or not valid Jinja (with its
            line).
    """
    path = resolve_path(setting)
    start = f"base.chat_template: {setting}"
    try:
        if path.is_dir():
            raise BadInput(f"{start} is a folder; name a Jinja file")
        if path.stat().st_size > MAX_BYTES:
            raise BadInput(f"{start}: has more than {MAX_BYTES:,} bytes; name a Jinja file")
        source = path.read_bytes().decode()
    except FileNotFoundError:
        raise BadInput(f"{start}: no such file; name a Jinja file") from None
    except UnicodeDecodeError:
        raise BadInput(f"{start}: is not UTF-8 text; name a Jinja file") from None
    except OSError as error:
        raise BadInput(f"{start}: cannot be read: {error.strerror}") from None
    if not source.strip():
        raise BadInput(f"{start}: is empty; write a template, or remove the setting")
    if problem := _syntax_problem(source, path):
        raise BadInput(f"base.chat_template: {problem}")
    return source


def _syntax_problem(source: str, path: Path) -> str | None:
    try:
        environment().from_string(source)
    except TemplateSyntaxError as error:
        reason = printable(str(error.message))
        return f"{path}:{error.lineno}: is not valid Jinja: {reason}; correct the line"
    return None
