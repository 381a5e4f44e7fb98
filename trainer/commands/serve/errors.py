"""Refused requests, as OpenAI's API reports them."""

from __future__ import annotations

from typing import Any

from fastapi.responses import JSONResponse

#: Type of an error by its HTTP status; others are of the request or, from 500, of the server.
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that cannot be answered.

    Attributes:
        message: names the problem and the remedy.
        param: field of the body.
        code: name of the problem, for programs.
        retry_after: seconds after which the request may succeed.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message = status, message
        self.code, self.param, self.retry_after = code, param, retry_after

    def body(self) -> dict[str, Any]:
        default = "invalid_request_error" if self.status < 500 else "server_error"
        kind = _TYPES.get(self.status, default)
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> JSONResponse:
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), self.status, headers)


def invalid(message: str, param: str | None = None) -> ApiError:
    return ApiError(400, message, code="invalid_value", param=param)


def stopping() -> ApiError:
    return ApiError(503, "the server is stopping", code="server_stopping")


def failed() -> ApiError:
    return ApiError(500, "the server has failed; see the logs of the run", code="server_failed")
