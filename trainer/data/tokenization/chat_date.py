"""Date that the chat template of a run reads, stored in its output folder.

Templates of some families write today's date into every dialogue. A run stores the date of its
first start, so that resuming and generating use the same tokens.
"""

from __future__ import annotations

import datetime
from pathlib import Path

from trainer.runtime import atomic_io
from trainer.runtime.errors import BadInput

CHAT_DATE = "chat-date.txt"


def read_chat_date(output: Path) -> datetime.date | None:
    """Read the stored date of a run; None if there is none.

    Raises:
        BadInput: the file is damaged.
    """
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
