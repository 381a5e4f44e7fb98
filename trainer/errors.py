"""Exit codes, and the one exception that means "the user can fix this"."""

from __future__ import annotations

from collections.abc import Iterable

EXIT_DONE = 0
EXIT_FAILURE = 1
EXIT_BAD_INPUT = 2
EXIT_RESUMABLE = 75  # EX_TEMPFAIL of sysexits.h: stopped, a checkpoint is there, run it again


class BadInput(ValueError):
    """What a person wrote cannot be run: every problem found, one line each.

    A problem names the file, line or setting, the value, and the remedy. The command line prints
    the lines and ends with exit code 2.
    """

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))
