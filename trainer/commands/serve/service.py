"""The models that clients can name, and the requests that their bodies become."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from trainer.commands.serve.bodies import Body, ChatBody, CompletionBody
from trainer.commands.serve.errors import ApiError, invalid
from trainer.commands.serve.token_texts import TokenTexts
from trainer.config import Task, split_template
from trainer.inference.requests import (
    GenerationRequest,
    RequestNames,
    dialogue_request,
    text_request,
)
from trainer.inference.stream import StreamingDecoder
from trainer.model.checkpoint_files import BaseFiles
from trainer.prompts.soft_prompt import SoftPrompt
from trainer.runtime.errors import BadInput, did_you_mean

#: Names of the base among the models; the second one if a prompt has the first.
BASE_NAMES = ("base", "base-without-prompt")


@dataclass(frozen=True)
class ServedModel:
    """A prompt, or the base alone.

    Attributes:
        task: its template, stop strings and default of ``max_tokens`` are used.
        prompt: None for the base, whose ``task`` has the template ``{text}``.
        position: ``Prompt.placement``.
        created: when the prompt was written, in Unix seconds.
    """

    name: str
    task: Task
    prompt: SoftPrompt | None
    position: str = "front"
    created: int = 0

    def entry(self) -> dict[str, Any]:
        """Return the model's entry in ``/v1/models``."""
        num_virtual = 0 if self.prompt is None else self.prompt.num_virtual_tokens
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "promptshard",
            "task": None if self.prompt is None else self.task.name,
            "virtual_tokens": num_virtual,
        }


@dataclass(frozen=True)
class Service:
    """What the routes need.

    Attributes:
        models: by name.
        date: the date that chat templates read; None: today.
        max_tokens: largest ``max_tokens``; None: as many as the context allows.
    """

    decoder: StreamingDecoder
    files: BaseFiles
    models: Mapping[str, ServedModel]
    date: datetime.date | None = None
    max_tokens: int | None = None

    @cached_property
    def token_texts(self) -> TokenTexts:
        return TokenTexts(self.files.tokenizer)

    def model(self, name: str) -> ServedModel:
        """Return the model with a name; raises ``ApiError``."""
        if name not in self.models:
            known = list(self.models)
            raise ApiError(
                404,
                f"model: {name[:100]!r} is not served{did_you_mean(name[:100], known)}; GET "
                f"/v1/models lists the {len(known)} models",
                code="model_not_found",
                param="model",
            )
        return self.models[name]

    def completions(self, body: CompletionBody) -> list[GenerationRequest]:
        """Return one request per text; a text fills the task's template if it has one column."""
        model = self.model(body.model)
        limit = self._limit(model, body)
        requests = []
        for text in body.prompt:
            with_text = (self.files, model.task, text, model.prompt, model.position)
            try:
                names = RequestNames("prompt", "max_tokens")
                request = text_request(*with_text, limit, self.date, names)
            except BadInput as error:
                raise _as_api_error(error, "prompt") from None
            requests.append(_with_stops(request, body))
        return requests

    def chat(self, body: ChatBody) -> GenerationRequest:
        """Return the request for the next answer of a dialogue."""
        model = self.model(body.model)
        limit = self._limit(model, body)
        if not self.files.tokenizer.chat_template:
            raise invalid(
                "the base has no chat template; use /v1/completions, or train with "
                "base.chat_template",
                "model",
            )
        if split_template(model.task.input) is not None:
            raise invalid(
                f"model: the virtual tokens of {model.name!r} are inside the input template of "
                "its task, which a chat does not use; use /v1/completions",
                "model",
            )
        turns = [message.turn() for message in body.messages]
        dialogue = (self.files, model.task, turns, model.prompt, model.position)
        try:
            names = RequestNames("messages", "max_tokens")
            request = dialogue_request(*dialogue, limit, self.date, names)
        except BadInput as error:
            raise _as_api_error(error, "messages") from None
        return _with_stops(request, body)

    def _limit(self, model: ServedModel, body: Body) -> int:
        """Return the maximum number of tokens of an answer."""
        largest = self.max_tokens
        if body.max_tokens is None:
            own = model.task.max_new_tokens
            return own if largest is None else min(own, largest)
        if largest is not None and body.max_tokens > largest:
            raise invalid(
                f"max_tokens: {body.max_tokens} is more than this server's limit of {largest}; "
                "lower it, or restart the server with a larger --max-tokens",
                "max_tokens",
            )
        return body.max_tokens


def _with_stops(request: GenerationRequest, body: Body) -> GenerationRequest:
    """Add the stop strings of the body."""
    stop = replace(request.stop, strings=(*body.stop, *request.stop.strings))
    return replace(request, stop=stop)


def _as_api_error(error: BadInput, param: str) -> ApiError:
    text = "; ".join(error.problems)
    too_long = "must have 1 to" in text or "leaves no room" in text
    code = "context_length_exceeded" if too_long else "invalid_value"
    return ApiError(400, text, code=code, param=param)
