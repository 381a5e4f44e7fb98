"""Options of ``promptshard serve``. Imports no torch."""

from __future__ import annotations

import argparse
import errno
import ipaddress
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.runtime.errors import BadInput

#: Environment variable with the token that clients must send.
TOKEN_VARIABLE = "PROMPTSHARD_SERVE_TOKEN"
MIN_TOKEN_LENGTH = 16
HOST, PORT = "127.0.0.1", 8000
CONCURRENT, WAITING = 64, 256
REQUEST_BYTES = 1 << 20


@dataclass(frozen=True)
class Options:
    """What to serve, where, and the limits.

    Attributes:
        prompts: names; empty: all finished prompts of the run.
        port: 0: any free port.
        token_file: file with the bearer token; None: the environment variable, if set.
        anonymous: serve addresses other than loopback without a token.
        concurrent: requests that are decoded at the same time.
        waiting: further requests that wait.
        max_tokens: largest ``max_tokens`` of a request; None: as many as the context allows.
        request_bytes: largest body of a request.
    """

    run_dir: Path
    prompts: tuple[str, ...] = ()
    host: str = HOST
    port: int = PORT
    token_file: str | None = None
    anonymous: bool = False
    concurrent: int = CONCURRENT
    waiting: int = WAITING
    max_tokens: int | None = None
    request_bytes: int = REQUEST_BYTES

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect."""
        return is_loopback(self.host)

    def arguments(self) -> list[str]:
        """Return the command line that ``parse`` reads."""
        words = [str(self.run_dir), f"--host={self.host}", f"--port={self.port}"]
        words += [f"--prompt={name}" for name in self.prompts]
        words += [f"--max-concurrent={self.concurrent}", f"--max-waiting={self.waiting}"]
        words += [f"--max-request-bytes={self.request_bytes}"]
        words += [f"--max-tokens={self.max_tokens}"] if self.max_tokens is not None else []
        words += [f"--token-file={self.token_file}"] if self.token_file is not None else []
        return words + (["--no-token"] if self.anonymous else [])

    def read_token(self) -> str | None:
        """Return the token that clients must send, if any.

        Raises:
            BadInput: the file cannot be read, the token is too short, or there is none although
                other machines can connect.
        """
        token, source = os.environ.get(TOKEN_VARIABLE), TOKEN_VARIABLE
        if self.token_file is not None:
            source = f"--token-file: {self.token_file}"
            try:
                token = Path(self.token_file).read_text(encoding="utf-8").strip()
            except (OSError, UnicodeDecodeError) as error:
                reason = getattr(error, "strerror", None) or "is not UTF-8 text"
                raise BadInput(f"{source}: cannot be read ({reason}); give a text file") from None
        if token is not None and (len(token) < MIN_TOKEN_LENGTH or not token.isascii()):
            raise BadInput(
                f"{source}: a token needs {MIN_TOKEN_LENGTH} or more ASCII characters; make one "
                "with: openssl rand -hex 32"
            )
        if token is None and not self.is_loopback and not self.anonymous:
            raise BadInput(
                f"--host: {self.host} lets other machines connect; set {TOKEN_VARIABLE} or "
                "--token-file to the token that clients must send, or add --no-token to allow "
                "everyone"
            )
        return token

    def bind(self) -> socket.socket:
        """Listen on the address; raises ``BadInput`` if it is in use or not of this machine."""
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                self.host, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
        except (OSError, UnicodeError):
            raise self._not_here() from None
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(address)
        except OSError as error:
            listening.close()
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise self._not_here() from None
            raise BadInput(
                f"--port: {self.port} of {self.host} cannot be used ({error.strerror}); give "
                "another --port, or 0 for a free one"
            ) from None
        return listening

    def _not_here(self) -> BadInput:
        return BadInput(
            f"--host: {self.host!r} is not an address of this machine; use 127.0.0.1, or 0.0.0.0 "
            "for all addresses"
        )


def is_loopback(host: str) -> bool:
    """Whether a host name or address is only reachable from this machine."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def parse(arguments: Sequence[str] | None) -> Options:
    """Parse the arguments of a rank."""
    parser = argparse.ArgumentParser(prog="deepspeed --module trainer.commands.serve")
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path)
    parser.add_argument("--prompt", dest="prompts", action="append", default=[], metavar="NAME")
    parser.add_argument("--host", default=HOST)
    parser.add_argument("--port", type=int, default=PORT)
    parser.add_argument("--token-file", metavar="FILE")
    parser.add_argument("--no-token", dest="anonymous", action="store_true")
    parser.add_argument("--max-concurrent", dest="concurrent", type=int, default=CONCURRENT)
    parser.add_argument("--max-waiting", dest="waiting", type=int, default=WAITING)
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument(
        "--max-request-bytes", dest="request_bytes", type=int, default=REQUEST_BYTES
    )
    parser.add_argument("--local_rank", type=int, help="given by the launcher; not used")
    values: dict[str, Any] = vars(parser.parse_args(arguments))
    del values["local_rank"]
    values["prompts"] = tuple(values["prompts"])
    return Options(**values)
