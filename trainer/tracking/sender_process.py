"""The process beside the trainer: reads ``metrics.jsonl``, sends it, and ends with the trainer.

It learns of the trainer by its standard input: "finish" means that everything is written; an end
of file, or another parent, that the trainer is gone. From then on it has a few seconds, held by a
timer that no hanging call can delay.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import signal
import sys
import threading
import time
from itertools import count
from pathlib import Path
from typing import Any, TextIO

from trainer.runtime.errors import BadInput
from trainer.tracking.final_results import ReadResults
from trainer.tracking.metrics_log import SYSTEM_FILE, MetricsLog, read_lines
from trainer.tracking.mlflow_store import Refused
from trainer.tracking.progress_file import ProgressFile
from trainer.tracking.pusher import Pusher, explain, folder_lock, is_busy
from trainer.tracking.run_metadata import RunMetadata
from trainer.tracking.store_uri import StoreAddress, resolve

logger = logging.getLogger(__name__)
LONGEST_PAUSE = 30.0
#: The trainer needs the processors more: a round of many prompts' curves is followed by a pause of
#: so many times as long.
REST = 9.0
SYSTEM_EVERY = 10.0

#: A call that hangs holds up the next one, not the trainer. What a person has set stays.
HTTP_LIMITS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the next round is the retry
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}


def follow(
    output_dir: Path,
    uri: str | None,
    read_results: ReadResults,
    *,
    parent: int,
    stale_summary_ns: int | None,
    every: float,
    grace: float,
) -> int:
    """Run until the trainer has finished or is gone; 0 if everything was sent."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # meant for the trainer; its end is ours
    trainer = _Trainer(parent, grace)
    target = resolve(output_dir, uri)
    write_log(output_dir, target)
    target.apply(os.environ)
    for name, value in HTTP_LIMITS.items():
        os.environ.setdefault(name, value)
    while True:
        with folder_lock(output_dir) as free:
            if free:
                return _follow(output_dir, target, read_results, trainer, stale_summary_ns, every)
        # The sender of an earlier trainer has a few more seconds.
        if trainer.wait(0.5) and trainer.gone:
            return 1


def _follow(
    output_dir: Path,
    target: StoreAddress,
    read_results: ReadResults,
    trainer: _Trainer,
    stale_ns: int | None,
    every: float,
) -> int:
    state = ProgressFile(output_dir)
    state.stale_summary_ns = stale_ns
    state.store, state.problem = target.name, None  # also where nothing can be sent yet
    state.save()
    pusher = Pusher(output_dir, target, state, read_results)
    stop = threading.Event()
    watch: threading.Thread | None = None
    if RunMetadata(output_dir).tracking.get("system_metrics", True):
        watch = _start_watch(output_dir, stop)
    pause, failures = 0.0, 0
    while not trainer.wait(pause):
        begun, connected = time.monotonic(), pusher.connected
        try:
            pusher.push(running=True)
            took = time.monotonic() - begun if connected else 0.0  # connecting is not every round's
            pause, failures = max(every, min(LONGEST_PAUSE, REST * took)), 0
            _tell(state, None)
        except Exception as error:
            pause, failures = min(LONGEST_PAUSE, max(every, pause * 2)), failures + 1
            problem = explain(error, target, output_dir)
            logger.warning("not sent, next try in %.1f s: %s", pause, problem)
            logger.debug("", exc_info=True)
            if failures > 1 or isinstance(error, Refused | BadInput):
                _tell(state, problem)
    stop.set()
    if watch is not None:
        watch.join(2.0)
    for attempt in count(1):
        try:
            pusher.end()
            break
        except Exception as error:
            problem = explain(error, target, output_dir)
            logger.warning("not everything was sent (try %d): %s", attempt, problem)
            if attempt > 1 and not is_busy(error):
                _tell(state, problem)
                break
            time.sleep(0.5)
    unsent = pusher.unsent()
    logger.info("ended; not sent: %s", unsent)
    return 1 if unsent else 0


def _tell(state: ProgressFile, problem: str | None) -> None:
    """Leave word for the trainer, which shows it on the terminal."""
    if state.problem != problem:
        state.problem = problem
        with contextlib.suppress(OSError):
            state.save()


def _start_watch(output_dir: Path, stop: threading.Event) -> threading.Thread | None:
    try:
        gauges = _gauges()  # here: mlflow cannot be imported by two threads at a time
    except Exception as error:
        logger.warning("no system metrics: %s", error)
        return None
    watch = threading.Thread(target=_watch_system, args=(output_dir, gauges, stop), daemon=True)
    watch.start()
    return watch


class _Trainer:
    """What the sidecar knows of the process that started it."""

    def __init__(self, parent: int, grace: float) -> None:
        self.parent, self.grace = parent, grace
        self.ending = self.gone = False

    def wait(self, seconds: float) -> bool:
        """Wait at most ``seconds``; whether it is time to end."""
        until = time.monotonic() + seconds
        while not self.ending:
            left = until - time.monotonic()
            ready, _, _ = select.select([sys.stdin], [], [], max(0.0, min(left, 1.0)))
            if ready:
                words = sys.stdin.readline().split()
                if words[:1] == ["finish"]:
                    self._end(float(words[1]))
                else:
                    self.gone = True
                    self._end(self.grace)
            elif os.getppid() != self.parent:
                self.gone = True
                self._end(self.grace)
            elif left <= 0:
                return False
        return True

    def _end(self, seconds: float) -> None:
        self.ending = True
        logger.info("trainer %s; at most %.0f s more", "gone" if self.gone else "done", seconds)
        timer = threading.Timer(seconds, os._exit, args=(1,))
        timer.daemon = True
        timer.start()


def _watch_system(output_dir: Path, gauges: list[Any], stop: threading.Event) -> None:
    """Load and memory of this node into a file that is sent like the metrics, every few seconds."""
    node = os.environ.get("MLFLOW_SYSTEM_METRICS_NODE_ID")
    prefix = f"system/{node}/" if node else "system/"
    every = float(os.environ.get("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL") or SYSTEM_EVERY)
    path = output_dir / SYSTEM_FILE
    try:
        step = sum(1 for _ in read_lines(path))
        log = MetricsLog(path.parent, path.name)
        while not stop.is_set():
            values: dict[str, float] = {}
            for gauge in gauges:
                gauge.collect_metrics()
                values |= {prefix + k: v for k, v in gauge.aggregate_metrics().items()}
                gauge.clear_metrics()
            log.log(step, None, values)
            step += 1
            stop.wait(every)
    except Exception as error:
        logger.warning("no system metrics: %s", error)


def _gauges() -> list[Any]:
    """MLflow's own gauges, under the names its pages know.

    Not its ``SystemMetricsMonitor``: that sends by itself, and gives up at the first failing call.
    """
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
    from mlflow.system_metrics.metrics.rocm_monitor import ROCMMonitor

    gauges: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    for kind in (GPUMonitor, ROCMMonitor):
        with contextlib.suppress(Exception):  # no such GPU, or no library for it
            gauges.append(kind())
            break
    return gauges


def write_log(output_dir: Path, target: StoreAddress) -> None:
    """Everything this process says goes to ``logs/tracking.log``, without credentials."""
    path = output_dir / "logs" / "tracking.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    stream: Any = _HidingStream(path.open("a", encoding="utf-8", buffering=1), target)
    sys.stdout = sys.stderr = stream
    logging.basicConfig(
        stream=stream,
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        force=True,
    )
    logging.getLogger("alembic").setLevel(logging.WARNING)


class _HidingStream:
    """A text stream that hides the target's secrets in all that is written to it."""

    def __init__(self, stream: TextIO, target: StoreAddress) -> None:
        self._stream, self._target = stream, target

    def write(self, text: str) -> int:
        self._stream.write(self._target.hide(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def main(argument: str, uri: str | None, read_results: ReadResults) -> int:
    """Run ``python -m trainer.commands.sync follow``.

    Args:
        argument: keyword arguments of ``follow`` and ``output_dir``, as a JSON object.
        uri: the store's address; default: as ``resolve`` chooses.
        read_results: reads the final results of the folder.
    """
    options: dict[str, Any] = json.loads(argument)
    output_dir = Path(options.pop("output_dir"))
    try:
        return follow(output_dir, uri, read_results, **options)
    except BadInput as error:
        write_log(output_dir, StoreAddress("", ""))
        logger.error("%s", error)
        return 2
