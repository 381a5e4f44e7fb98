"""Guard process: end the ranks if ``promptshard`` dies, even by ``kill -9``.

The launcher and its ranks form one process group. The guard reads from a pipe that only
``promptshard`` holds open, which is closed when ``promptshard`` ends in any way. The guard then
ends the group, unless it has read ``DONE``. Imports only the standard library, to start in
milliseconds.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import suppress

DONE = b"done"
GRACE_SECONDS = 10.0


def main() -> None:
    group = int(sys.argv[1])
    if sys.stdin.buffer.read() == DONE:
        return
    with suppress(ProcessLookupError):  # the group has ended
        os.killpg(group, signal.SIGTERM)
        deadline = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < deadline:
            time.sleep(0.1)
            os.killpg(group, 0)
        os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    main()
