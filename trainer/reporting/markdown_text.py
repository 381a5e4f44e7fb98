"""Untrusted text in Markdown: model cards, and descriptions of runs in MLflow."""

from __future__ import annotations

import html
import re
import shlex

from trainer.runtime.redact import printable

_SPECIAL = re.compile(r"([\\`*_\[\]|~])")


def markdown(text: str) -> str:
    """Escape untrusted text, so that Markdown and HTML show it as it is, in one line."""
    one_line = " ".join(printable(text).split())
    return _SPECIAL.sub(r"\\\1", html.escape(one_line, quote=False))


def argument(text: str) -> str:
    """Quote untrusted text as one argument of a command in a block of code."""
    return shlex.quote(" ".join(printable(text).split()).replace("```", "` ` `"))


def code(text: str) -> str:
    """Format untrusted text as a span of code in one line, also in a table."""
    one_line = " ".join(printable(text).split()).replace("`", "'").replace("|", "¦")
    return f"`{one_line}`"
