"""Routes of the HTTP server."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse
from starlette.exceptions import HTTPException

from trainer.commands.serve.answers import Answers, ChatAnswers, CompletionAnswers
from trainer.commands.serve.bodies import MAX_CHOICES, Body, ChatBody, CompletionBody
from trainer.commands.serve.errors import ApiError, failed, invalid, stopping
from trainer.commands.serve.metrics import CONTENT_TYPE, Metrics
from trainer.commands.serve.service import Service
from trainer.commands.serve.submission import Submission
from trainer.inference.requests import GenerationRequest
from trainer.inference.stream_text import FinishReason

#: Problems of a body that are listed.
MAX_PROBLEMS = 5
#: Status in metrics and logs of a request whose client has disconnected, as in nginx.
CLIENT_CLOSED = 499
#: Line ends of Unicode that JSON does not escape.
_LINE_ENDS = {ord(character): f"\\u{ord(character):04x}" for character in "\x85\u2028\u2029"}


def make_app(service: Service, metrics: Metrics) -> FastAPI:
    """Return the application. Without pages for browsers, which would load scripts of others."""
    app = FastAPI(title="promptshard", docs_url=None, redoc_url=None)
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestValidationError, _invalid_body)
    app.add_exception_handler(HTTPException, _http_error)

    @app.get("/health")
    async def health() -> Response:
        if service.decoder.failure is not None:
            return failed().response()
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return PlainTextResponse(_metrics_text(service, metrics), media_type=CONTENT_TYPE)

    @app.get("/v1/models")
    async def list_models() -> Response:
        entries = [model.entry() for model in service.models.values()]
        return JSONResponse({"object": "list", "data": entries})

    @app.get("/v1/models/{name}")
    async def show_model(name: str) -> Response:
        return JSONResponse(service.model(name).entry())

    @app.post("/v1/completions")
    async def completions(body: CompletionBody, request: Request) -> Response:
        requests = service.completions(body)
        return await _answer(service, metrics, body, requests, request, CompletionAnswers)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatBody, request: Request) -> Response:
        requests = [service.chat(body)]
        return await _answer(service, metrics, body, requests, request, ChatAnswers)

    return app


async def _answer(
    service: Service,
    metrics: Metrics,
    body: Body,
    requests: Sequence[GenerationRequest],
    http_request: Request,
    kind: type[Answers],
) -> Response:
    """Decode ``n`` choices per request and answer with them."""
    count = body.n or 1
    limits = service.decoder.limits
    most = min(MAX_CHOICES, limits.rows + limits.waiting)  # more would never find room
    if len(requests) * count > most:
        raise invalid(
            f"n: {count} choices of {len(requests)} prompts are more than {most}; lower n or send "
            "fewer prompts",
            "n",
        )
    wanted = [(request, body.sampling(i)) for request in requests for i in range(count)]
    submission = Submission(
        *(service.decoder, metrics, body.model, wanted, http_request), at_end=not body.stream
    )
    answers = kind(
        body.model,
        service.token_texts,
        requests[0].stop.token_ids,
        sum(len(request.input_ids) for request in requests),
        len(wanted),
        scored=body.top_logprobs_wanted is not None,
    )
    if body.stream:
        events = _events(submission, answers, includes_usage=body.includes_usage)
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(events, media_type="text/event-stream", headers=headers)
    problem: ApiError | None = None
    async for number, piece in submission.pieces():
        problem = problem or _problem(piece.finish)
        answers.add(number, piece)
    if submission.is_disconnected:
        return Response(status_code=CLIENT_CLOSED)
    return JSONResponse(answers.complete()) if problem is None else problem.response()


async def _events(
    submission: Submission, answers: Answers, *, includes_usage: bool
) -> AsyncIterator[str]:
    async for number, piece in submission.pieces():
        if (problem := _problem(piece.finish)) is not None:
            yield event(problem.body())
            return
        yield event(answers.chunk(number, piece))
    if includes_usage:
        yield event(answers.usage_chunk())
    yield "data: [DONE]\n\n"


def event(value: dict[str, Any]) -> str:
    """Return a server-sent event.

    Line ends of Unicode are escaped: some clients end a line of the stream there, such as httpx's
    ``iter_lines``.
    """
    data = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return f"data: {data.translate(_LINE_ENDS)}\n\n"


def _problem(finish: FinishReason | None) -> ApiError | None:
    """Return the error of a choice that has not ended by itself."""
    return {"cancelled": stopping, "failed": failed}.get(finish or "", lambda: None)()


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    text = {
        400: "the body cannot be read; send a JSON object in UTF-8",
        404: "no such path; there are /v1/models, /v1/completions, /v1/chat/completions, /health "
        "and /metrics",
        405: "this path does not have this method",
    }.get(error.status_code, str(error.detail))
    return ApiError(error.status_code, text, code="invalid_request").response()


async def _invalid_body(request: Request, error: Exception) -> Response:
    """List the problems of a body, without its values."""
    assert isinstance(error, RequestValidationError)
    problems: dict[str, None] = {}
    param: str | None = None
    for problem in error.errors()[:MAX_PROBLEMS]:
        place = ".".join(str(part) for part in problem["loc"][1:])
        text = str(problem["msg"])
        if problem["type"] == "value_error":
            text = text.removeprefix("Value error, ")
            if not place:  # of the whole body: the message names the field
                place, _, text = text.partition(": ")
        elif problem["type"] == "json_invalid":
            place, text = "body", "is not valid JSON"
        elif not place:
            place = "body"
            text = (
                "no JSON object was sent; send one, with the header Content-Type: application/json"
            )
        elif problem["type"] == "extra_forbidden":
            text = "is not supported; leave it out"
        param = param or place.split(".")[0]
        problems[f"{place}: {text}"] = None
    return invalid("; ".join(problems), param).response()


def _metrics_text(service: Service, metrics: Metrics) -> str:
    decoder = service.decoder
    gauges = {
        "running": ("Choices that are decoded.", float(decoder.num_running)),
        "waiting": ("Choices that wait.", float(decoder.num_waiting)),
        "cache_rows": ("Rows in the key-value caches of all ranks.", float(decoder.rows)),
    }
    counters = {"generated_tokens_total": ("Generated tokens.", float(decoder.generated))}
    return metrics.text(gauges, counters)
