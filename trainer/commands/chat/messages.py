"""Lines of JSON between the command line and rank 0 of a chat. Imports no torch."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Question:
    """A request of the command line for an answer.

    Attributes:
        number: identifies the answer.
        prompt: name; None: the base alone.
        dialogue: turns so far, of ``role`` and ``content``; the last one is the user's.
        chat_template: write the dialogue with the base's chat template; otherwise fill the last
            turn into the template of the prompt's task.
        max_new_tokens: None: the task's.
        cancel: end the answer with this number instead.
    """

    number: int
    prompt: str | None = None
    dialogue: list[dict[str, str]] = field(default_factory=list)
    chat_template: bool = True
    max_new_tokens: int | None = None
    cancel: bool = False


@dataclass(frozen=True)
class Reply:
    """A part of an answer.

    Attributes:
        number: of the question; 0: the base is loaded.
        text: further text of the answer.
        dropped: number of the oldest turns that the context has no room for.
        finish: set in the last part: ``stop``, ``length``, ``cancelled``, or ``failed``: the ranks
            have failed, and answer no further question.
        error: the reason why the request failed. Like ``finish``, it is in the last part only.
        has_chat_template: of the base, with number 0.
    """

    number: int
    text: str = ""
    dropped: int = 0
    finish: str | None = None
    error: str | None = None
    has_chat_template: bool = False


class Channel:
    """Sends and receives lines; threads may send at the same time."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self._lock = threading.Lock()
        self._buffer = b""

    def send(self, message: Question | Reply) -> None:
        """Send a message; raises ``OSError`` if the other end is closed."""
        line = json.dumps(asdict(message)).encode() + b"\n"
        with self._lock:
            self.socket.sendall(line)

    def receive(self) -> dict[str, Any] | None:
        """Return the next message; None if the other end is closed.

        Raises:
            TimeoutError: nothing came within the socket's timeout.
        """
        while b"\n" not in self._buffer:
            try:
                received = self.socket.recv(1 << 16)
            except ConnectionError:
                return None
            if not received:
                return None
            self._buffer += received
        line, _, self._buffer = self._buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def questions(self) -> Iterator[Question]:
        """Yield questions until the other end is closed."""
        while (message := self.receive()) is not None:
            yield Question(**message)
