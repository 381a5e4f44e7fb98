"""Guard process: ends the ranks if ``promptshard`` dies, even by ``kill -9``.

The launcher and its ranks form one process group. The guard reads from a pipe that only
``promptshard`` holds open, so it wakes up however ``promptshard`` ends. It then ends the group,
unless it has read ``DONE``. Standard library only: it starts in milliseconds.
"""

from __future__ import annotations

import os
import signal
import sys
import time

DONE = b"done"
GRACE_SECONDS = 10.0


def alive(group: int) -> bool:
    """Whether the process group has any process, zombies included."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def main() -> None:
    group = int(sys.argv[1])
    if sys.stdin.buffer.read() == DONE:
        return
    for ending, seconds in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, 0.0)):
        try:
            os.killpg(group, ending)
        except ProcessLookupError:
            return
        deadline = time.monotonic() + seconds
        while alive(group) and time.monotonic() < deadline:
            time.sleep(0.1)


if __name__ == "__main__":
    main()
