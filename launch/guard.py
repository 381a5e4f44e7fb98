"""A small process that outlives ``promptshard`` by a moment: no orphans after ``kill -9``.

The launcher and its ranks are a process group of their own. This process waits at the other end of
a pipe that only ``promptshard`` holds, so that it wakes whatever way ``promptshard`` ends, and ends
the group unless it was told that all is done. Standard library only: it starts in milliseconds.
"""

from __future__ import annotations

import os
import signal
import sys
import time

DONE = b"done"
GRACE_SECONDS = 10.0


def alive(group: int) -> bool:
    """Whether the process group has any process, be it a zombie."""
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
