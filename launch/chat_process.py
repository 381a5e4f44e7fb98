"""Start the ranks of a chat and talk to rank 0."""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from launch import launcher_command, launcher_process, messages, preflight
from launch.start import count
from trainer.commands.chat.messages import Channel, Question, Reply
from trainer.runtime.errors import EXIT_FAILURE
from trainer.runtime.limits import num_cores
from trainer.runtime.log_folder import inference_logs

MODULE = "trainer.commands.chat"
#: Seconds in which the ranks end by themselves after the socket is closed.
END_SECONDS = 20.0


class ChatEngine:
    """The ranks, as seen by the command line."""

    def __init__(self, process: subprocess.Popen[bytes], channel: Channel) -> None:
        self._process, self._channel = process, channel
        self._replies: queue.SimpleQueue[Reply | None] = queue.SimpleQueue()
        threading.Thread(target=self._receive, name="replies", daemon=True).start()

    def ask(self, question: Question) -> None:
        """Send a question; without effect if the ranks have ended, which ``reply`` reports."""
        with suppress(OSError):
            self._channel.send(question)

    def reply(self) -> Reply | None:
        """Wait for the next part of an answer; None if the ranks have ended."""
        return self._replies.get()

    def exit_code(self) -> int:
        """Return the exit code of ranks that have ended."""
        with suppress(subprocess.TimeoutExpired):
            return self._process.wait(END_SECONDS) or EXIT_FAILURE
        return EXIT_FAILURE

    def _receive(self) -> None:
        with suppress(OSError, ValueError):
            while (message := self._channel.receive()) is not None:
                self._replies.put(Reply(**message))
        self._replies.put(None)


@contextmanager
def engine(run_dir: str, processes: int | None) -> Iterator[ChatEngine]:
    """Start the ranks, one per GPU, or on the CPU; end them with the block."""
    gpus = launcher_command.visible_gpus(
        launcher_command.list_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES")
    )
    wanted = 1 if processes is None and not gpus else processes
    devices = launcher_command.choose_devices(wanted, gpus)
    log = preflight.open_log(inference_logs(Path(run_dir)), "launcher-chat.log")
    messages.note(f"starting {count(len(devices.ids), 'process')}; logs: {log.parent}")
    cores = num_cores()
    environment = launcher_command.environment(os.environ, devices, cores, [run_dir])
    if len(devices.ids) == 1:
        command, environment = launcher_command.direct_command(MODULE, devices, environment)
    else:
        command = launcher_command.local_command(MODULE, devices, launcher_command.free_port())
    ours, theirs = socket.socketpair()
    with log.open("wb") as chatter, ours:
        with theirs:
            process = launcher_process.start(
                command,
                env=environment,
                stdin=theirs,
                stdout=chatter,
                start_new_session=True,  # the terminal's Ctrl-C reaches only this process
            )
        with launcher_process.guarded(process.pid):
            try:
                yield ChatEngine(process, Channel(ours))
            finally:
                with suppress(OSError):
                    ours.shutdown(socket.SHUT_RDWR)
                _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Wait until the ranks have ended, and kill them if they do not."""
    try:
        process.wait(END_SECONDS)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        launcher_process.signal_group(process.pid, signal.SIGKILL)
        process.wait()
    launcher_process.signal_group(process.pid, signal.SIGKILL)  # ranks that outlived the launcher
