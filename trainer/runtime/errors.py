"""Exit codes, the one exception that means "the user can fix this", and hints for its words."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

EXIT_DONE = 0
EXIT_FAILURE = 1
EXIT_BAD_INPUT = 2
EXIT_PORT_TAKEN = 69  # EX_UNAVAILABLE: of a rank; promptshard then tries another port
EXIT_RESUMABLE = 75  # EX_TEMPFAIL of sysexits.h: stopped, a checkpoint is there, run it again


class BadInput(ValueError):
    """What a person wrote cannot be run: every problem found, one line each.

    A problem names the file, line or setting, the value, and the remedy. The command line prints
    the lines and ends with exit code 2.
    """

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class PortTaken(RuntimeError):
    """Another process listens at the port where the ranks should meet."""


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """`` (did you mean 'x'?)`` with the nearest known name, whatever its case, or nothing."""
    lower = {name.lower().strip(): name for name in known}
    close = difflib.get_close_matches(word.lower().strip(), list(lower), n=1)
    return f" (did you mean {lower[close[0]]!r}?)" if close else ""
