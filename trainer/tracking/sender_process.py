"""The background process that sends ``metrics.jsonl`` to MLflow and ends with the trainer.

The trainer controls the sender through its standard input: a line ``finish SECONDS`` means that
everything is written; end of file, or another parent process, means that the trainer has died. The
sender then ends within a few seconds, enforced by a timer that no hanging call can delay.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
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
from trainer.tracking.metrics_log import SYSTEM_FILE, MetricsLog, read_lines
from trainer.tracking.pusher import Pusher, folder_lock
from trainer.tracking.refusals import explain, is_busy, is_refusal
from trainer.tracking.run_metadata import ReadResults
from trainer.tracking.store_uri import StoreAddress, resolve

logger = logging.getLogger(__name__)
MAX_PAUSE = 30.0
#: Tries in a row that a server may refuse; the pauses grow by the factor (2 s: 3 minutes in all).
#: After that, one more try at the end of the run.
MAX_REFUSALS, REFUSAL_FACTOR = 5, 4.0
#: A pause is at least this many times as long as the round of sending before it, because training
#: needs the processors more.
PAUSE_RATIO = 9.0
SYSTEM_EVERY = 10.0


def main(argument: str, uri: str | None, read_results: ReadResults) -> int:
    """Send until the trainer has finished or died; return 0 if everything was sent.

    Args:
        argument: the options of ``TrackingClient.start``, as a JSON object.
        uri: the store's address; default: as ``resolve`` chooses.
    """
    options: dict[str, Any] = json.loads(argument)
    output_dir = Path(options["output_dir"])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)  # the trainer handles them and ends this process
    trainer = _Trainer(options["parent"], options["grace"])
    try:
        target = resolve(output_dir, uri)
        _redirect_output(output_dir, target)
        target.apply(os.environ)
        while True:
            with folder_lock(output_dir) as acquired:
                if acquired:
                    pusher = Pusher(output_dir, target, read_results)
                    return _send(pusher, trainer, options["every"])
            # The sender of an earlier trainer may run for a few more seconds.
            if trainer.wait(0.5) and trainer.is_gone:
                return 1
    except BadInput as error:
        _redirect_output(output_dir, StoreAddress("", ""))
        logger.error("%s", error)
        return 2


def _send(pusher: Pusher, trainer: _Trainer, every: float) -> int:
    output_dir, target = pusher.folder.path, pusher.target
    # Written even if nothing can be sent yet.
    pusher.state.store, pusher.state.problem = target.name, None
    pusher.state.save()
    stop = threading.Event()
    monitor: threading.Thread | None = None
    if pusher.folder.tracking.system_metrics:
        monitor = _start_monitor(output_dir, stop)
    _follow(pusher, trainer, every)
    stop.set()
    if monitor is not None:
        monitor.join(2.0)
    for attempt in count(1):
        try:
            pusher.end()
            break
        except Exception as error:
            problem = explain(error, target, output_dir)
            logger.warning("not everything was sent (try %d): %s", attempt, problem)
            if is_refusal(error) or (attempt > 1 and not is_busy(error)):
                pusher.set_problem(problem)
                break
            time.sleep(0.5)
    unsent = pusher.unsent()
    logger.info("ended; not sent: %s", unsent or "nothing")
    return 1 if unsent else 0


def _follow(pusher: Pusher, trainer: _Trainer, every: float) -> None:
    """Send in rounds until the trainer ends, or until the server has refused too often."""
    pause, failures, refusals = 0.0, 0, 0
    while not trainer.wait(pause):
        started, connected = time.monotonic(), pusher.connected
        try:
            pusher.push(running=True)
            seconds = time.monotonic() - started if connected else 0.0  # without connecting
            pause, failures, refusals = max(every, min(MAX_PAUSE, PAUSE_RATIO * seconds)), 0, 0
            pusher.set_problem(pusher.upload_problem and f"files: {pusher.upload_problem}")
        except Exception as error:
            failures += 1
            refusals = refusals + 1 if is_refusal(error) else 0
            pause = min(MAX_PAUSE, max(every, pause * 2))
            if refusals:
                pause = every * REFUSAL_FACTOR ** (refusals - 1)
            if refusals == MAX_REFUSALS:
                pause = math.inf
            problem = explain(error, pusher.target, pusher.folder.path)
            when = f"in {pause:.1f} s" if math.isfinite(pause) else "at the end of the run"
            logger.warning("not sent, next try %s: %s", when, problem)
            logger.debug("", exc_info=True)
            if failures > 1 or refusals:
                pusher.set_problem(problem)


class _Trainer:
    """The parent process: ``is_gone`` if it died, ``is_ending`` if it died or has finished."""

    def __init__(self, parent: int, grace: float) -> None:
        self.parent, self.grace = parent, grace
        self.is_ending = self.is_gone = False

    def wait(self, seconds: float) -> bool:
        """Wait at most ``seconds`` for the trainer's end; return ``is_ending``."""
        until = time.monotonic() + seconds
        while not self.is_ending:
            left = until - time.monotonic()
            ready, _, _ = select.select([sys.stdin], [], [], max(0.0, min(left, 1.0)))
            command = sys.stdin.readline().split() if ready else []
            if command[:1] == ["finish"]:
                self._end(float(command[1]))
            elif ready or os.getppid() != self.parent:
                self.is_gone = True
                self._end(self.grace)
            elif left <= 0:
                return False
        return True

    def _end(self, seconds: float) -> None:
        self.is_ending = True
        logger.info("trainer %s; at most %.0f s left", "gone" if self.is_gone else "done", seconds)
        timer = threading.Timer(seconds, os._exit, args=(1,))
        timer.daemon = True
        timer.start()


def _start_monitor(output_dir: Path, stop: threading.Event) -> threading.Thread | None:
    try:
        gauges = _gauges()  # not in the thread: two threads cannot import mlflow at a time
    except Exception as error:
        logger.warning("no system metrics: %s", error)
        return None
    monitor = threading.Thread(target=_log_system, args=(output_dir, gauges, stop), daemon=True)
    monitor.start()
    return monitor


def _gauges() -> list[Any]:
    """Return MLflow's own gauges, because its pages recognize their metric names.

    ``SystemMetricsMonitor`` is not used: it sends by itself and stops at the first failing call.
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


def _log_system(output_dir: Path, gauges: list[Any], stop: threading.Event) -> None:
    node = os.environ.get("MLFLOW_SYSTEM_METRICS_NODE_ID")
    prefix = f"system/{node}/" if node else "system/"
    every = float(os.environ.get("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL") or SYSTEM_EVERY)
    path = output_dir / SYSTEM_FILE
    try:
        log = MetricsLog(path.parent, path.name)
        for step in count(sum(1 for _ in read_lines(path))):
            values: dict[str, float] = {}
            for gauge in gauges:
                gauge.collect_metrics()
                values |= {prefix + k: v for k, v in gauge.aggregate_metrics().items()}
                gauge.clear_metrics()
            log.log(step, None, values)
            if stop.wait(every):
                return
    except Exception as error:
        logger.warning("no system metrics: %s", error)


def _redirect_output(output_dir: Path, target: StoreAddress) -> None:
    """Redirect all output of this process to ``logs/tracking.log``, without credentials."""
    path = output_dir / "logs" / "tracking.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    stream: Any = _RedactingStream(path.open("a", encoding="utf-8", buffering=1), target)
    sys.stdout = sys.stderr = stream
    logging.basicConfig(
        stream=stream,
        level=logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        force=True,
    )
    logging.getLogger("alembic").setLevel(logging.WARNING)


class _RedactingStream:
    def __init__(self, stream: TextIO, target: StoreAddress) -> None:
        self._stream, self._target = stream, target

    def write(self, text: str) -> int:
        self._stream.write(self._target.hide(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
