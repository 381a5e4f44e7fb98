"""Refuse HTTP requests before their body is parsed; count and log the others."""

from __future__ import annotations

import asyncio
import hmac
import sys
import time
import traceback
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trainer.commands.serve.errors import ApiError
from trainer.commands.serve.metrics import Metrics
from trainer.commands.serve.options import is_loopback

#: Seconds in which the body of a request must arrive.
BODY_SECONDS = 30.0
#: Paths in metrics and in the log; others could contain anything.
PATHS = frozenset({"/health", "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions"})


class Access:
    """ASGI middleware around the application.

    Args:
        token: bearer token that every request must send, except those to ``/health``.
        local_only: refuse requests whose Host header is not of this machine. Otherwise a web page
            could reach the server through a host name that resolves to 127.0.0.1.
        max_bytes: largest body.
        log: receives one line per request, without its text.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        *,
        token: str | None,
        local_only: bool,
        max_bytes: int,
        log: Callable[[str], object] = lambda line: None,
    ) -> None:
        self._app, self._metrics, self._log = app, metrics, log
        self._token = None if token is None else token.encode()
        self._local_only, self._max_bytes = local_only, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http", "no lifespan and no websockets"
        started, status = time.monotonic(), 0

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._metrics.open_requests += 1
        try:
            await self._answer(scope, receive, counted)
        except Exception as error:
            # Without the message of the error, which can contain text of a user.
            frames = "".join(traceback.format_tb(error.__traceback__))
            sys.stderr.write(f"{type(error).__name__} while answering a request\n{frames}")
            if not status:
                problem = ApiError(500, "the server cannot answer this", code="internal_error")
                await problem.response()(scope, receive, counted)
        finally:
            self._metrics.open_requests -= 1
            path = scope["path"] if scope["path"] in PATHS else "other"
            self._metrics.responses[path, str(status or "none")] += 1
            self._log(f"{path} {status or 'none'} {time.monotonic() - started:.3f} s")

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._check(scope)
            body = await self._read(scope, receive)
        except ApiError as error:
            response = error.response()
            response.headers["Connection"] = "close"  # the rest of the body is not read
            await response(scope, receive, send)
            return
        if body is not None:
            await self._app(scope, _with_body(body, receive), send)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        name = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
        if self._local_only and not is_loopback(name):
            raise ApiError(
                403,
                "the Host header names another machine; use http://127.0.0.1 or http://localhost, "
                "or start the server with a token",
                code="invalid_host",
            )
        if self._token is None or scope["path"] == "/health":
            return
        kind, _, given = headers.get("authorization", "").partition(" ")
        # Compared first, so that the time does not depend on where the tokens differ.
        is_equal = hmac.compare_digest(given.strip().encode(), self._token)
        if not is_equal or kind.lower() != "bearer":
            raise ApiError(
                401,
                "wrong or missing token; send the header Authorization: Bearer TOKEN (api_key of "
                "the openai client)",
                code="invalid_api_key",
            )

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """Return the body; None if the client has disconnected."""
        announced = Headers(scope=scope).get("content-length", "0")
        too_large = ApiError(
            413,
            f"the body is larger than {self._max_bytes} bytes; shorten it, or restart the server "
            "with a larger --max-request-bytes",
            code="request_too_large",
        )
        if announced.isdecimal() and int(announced) > self._max_bytes:
            raise too_large
        parts: list[bytes] = []
        size, is_complete = 0, False
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while not is_complete:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > self._max_bytes:
                        raise too_large
                    is_complete = not message.get("more_body", False)
        except TimeoutError:
            raise ApiError(
                408, f"the body did not arrive in {BODY_SECONDS:g} s", code="timeout"
            ) from None
        return b"".join(parts)


def _with_body(body: bytes, receive: Receive) -> Receive:
    """Return a ``receive`` with the body that has been read."""
    parts = [body]

    async def replayed() -> Message:
        if parts:
            return {"type": "http.request", "body": parts.pop(), "more_body": False}
        return await receive()

    return replayed
