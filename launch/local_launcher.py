"""Start the ranks of one machine: ``deepspeed.launcher.launch`` (0.19.8) without its imports.

DeepSpeed's own program imports torch and DeepSpeed, for seconds, before it starts a rank. This one
takes the same arguments and gives ranks the same environment; a test compares the two. It ends the
other ranks when one fails, and exits with that rank's code. Imports only the standard library.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import NoReturn

#: Time from SIGTERM to SIGKILL for ranks that remain when one has failed.
GRACE_SECONDS = 30.0
POLL_SECONDS = 0.1
#: Time for which failed ranks stay zombies, so that the parent process sees how they ended.
SEEN_SECONDS = 0.5


def rank_environments(
    world: Mapping[str, Sequence[int]], node_rank: int, address: str, port: int
) -> list[dict[str, str]]:
    """Return the environment variables of each rank of one host, as DeepSpeed sets them.

    Args:
        world: device ids by host, in rank order.
    """
    sizes = [len(ids) for ids in world.values()]
    ids, first = list(world.values())[node_rank], sum(sizes[:node_rank])
    shared = {
        "CUDA_VISIBLE_DEVICES": ",".join(map(str, ids)),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(sum(sizes)),
        "CROSS_RANK": str(node_rank),
        "CROSS_SIZE": str(len(sizes)),
        "LOCAL_SIZE": str(len(ids)),
    }
    ranks = range(first, first + len(ids))
    return [shared | {"RANK": str(r), "LOCAL_RANK": str(r % len(ids))} for r in ranks]


class Ranks:
    """The running ranks of this host."""

    def __init__(self, command: Sequence[str], environments: Sequence[Mapping[str, str]]) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._stopped)
        for environment in environments:
            process = subprocess.Popen(command, env={**os.environ, **environment})
            self._processes.append(process)
            _log(f"process {process.pid} spawned with command: {list(command)}")

    def wait(self) -> int:
        """Wait until all ranks have ended or some have failed; return the exit code.

        A rank that was killed by a signal is preferred to one that failed because of that.
        """
        running = {process.pid: process for process in self._processes}
        while running:
            ended = [pid for pid in running if _code(pid) is not None]
            if any(map(_code, ended)):
                time.sleep(SEEN_SECONDS)  # others fail at the same moment
                code = min(_code(pid) or 0 for pid in running)
                code = code or max(_code(pid) or 0 for pid in running)
                self._end()
                return code
            for pid in ended:
                _log(f"Process {pid} exits successfully.")
                del running[pid]
            time.sleep(POLL_SECONDS)
        return 0

    def _end(self) -> None:
        for process in self._processes:
            _log(f"Killing subprocess {process.pid}")
            process.terminate()
        deadline = time.monotonic() + GRACE_SECONDS
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()

    def _stopped(self, number: int, _: FrameType | None) -> NoReturn:
        self._end()
        _log(f"Main process received {signal.Signals(number).name}, exiting")
        sys.exit(1)


def _code(pid: int) -> int | None:
    """Exit code of a child, negative for a signal; None if it runs. It stays a zombie."""
    state = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if state is None:
        return None
    return state.si_status if state.si_code == os.CLD_EXITED else -state.si_status


def _log(text: str) -> None:
    print(f"[launch] {text}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="launch.local_launcher")
    parser.add_argument("--world_info", required=True, help="JSON in base64: device ids by host")
    parser.add_argument("--node_rank", type=int, required=True)
    parser.add_argument("--master_addr", required=True)
    parser.add_argument("--master_port", type=int, required=True)
    parser.add_argument("--no_local_rank", action="store_true", help="always so")
    parser.add_argument("script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    world = json.loads(base64.urlsafe_b64decode(args.world_info))
    environments = rank_environments(world, args.node_rank, args.master_addr, args.master_port)
    return Ranks([sys.executable, "-u", args.script, *args.arguments], environments).wait()


if __name__ == "__main__":
    code = main()
    sys.exit(code if code >= 0 else 256 + code)
