"""Exit codes, the exception for invalid input, and spelling hints for its messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

EXIT_DONE = 0
EXIT_FAILURE = 1
EXIT_BAD_INPUT = 2
EXIT_PORT_TAKEN = 69  # EX_UNAVAILABLE of sysexits.h: promptshard retries with another port
EXIT_RESUMABLE = 75  # EX_TEMPFAIL of sysexits.h: stopped; rerun the command to resume


class BadInput(ValueError):
    """Invalid input: a list of problems, each with place, value and remedy.

    The command line prints one line per problem and exits with code 2.
    """

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class PortTaken(RuntimeError):
    """Another process listens on the rendezvous port of the ranks."""


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """Return `` (did you mean 'x'?)`` with the closest known name; empty if none is close."""
    lower = {name.lower().strip(): name for name in known}
    close = difflib.get_close_matches(word.lower().strip(), list(lower), n=1)
    return f" (did you mean {lower[close[0]]!r}?)" if close else ""
