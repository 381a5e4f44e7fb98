"""Requests for generated text: token ids, prompt and stop criteria of one text."""

from __future__ import annotations

import datetime
from dataclasses import dataclass

from trainer.config import Task
from trainer.config.prompt import AFTER
from trainer.data.tokenization.chat_template import Messages, TemplateLimitExceeded
from trainer.data.tokenization.dialogue_rows import dialogue_encoder, limit_problem
from trainer.data.tokenization.message_edits import with_mark, with_system
from trainer.data.tokenization.tokenize import encode_request
from trainer.evaluation.stop_criteria import StopCriteria
from trainer.model.checkpoint_files import BaseFiles
from trainer.prompts.soft_prompt import SoftPrompt
from trainer.runtime.errors import BadInput


class TooLong(BadInput):
    """A text has more tokens than fit with the prompt and the longest answer."""


@dataclass(frozen=True)
class RequestNames:
    """What messages call the text of a request, and the maximum length of its answer.

    The defaults are arguments of the Python API.
    """

    text: str = "text"
    limit: str = "max_new_tokens"


API_NAMES = RequestNames()
MESSAGES = RequestNames("messages")


@dataclass(frozen=True)
class GenerationRequest:
    """One text to continue.

    Attributes:
        input_ids: of the text, without virtual tokens.
        prompt_at: number of these tokens before the virtual tokens.
        prompt: on the base's device; None: the base alone.
    """

    input_ids: tuple[int, ...]
    prompt_at: int
    prompt: SoftPrompt | None
    stop: StopCriteria
    max_new_tokens: int

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt, input and the longest answer."""
        virtual = 0 if self.prompt is None else self.prompt.num_virtual_tokens
        return virtual + len(self.input_ids) + self.max_new_tokens


def text_request(
    files: BaseFiles,
    task: Task,
    text: str,
    prompt: SoftPrompt | None,
    position: str,
    max_new_tokens: int | None,
    date: datetime.date | None,
    names: RequestNames = API_NAMES,
) -> GenerationRequest:
    """Make the request for one text, as ``promptshard generate`` reads it.

    Args:
        text: fills the task's template if that has one column that is not optional; otherwise it
            is the complete input.
        position: ``Prompt.placement``.
        max_new_tokens: None: the task's.

    Raises:
        BadInput: the text has no tokens, a token without an embedding, or leaves no room for an
            answer, or as ``encode_request``.
    """
    ids, at = encode_request(
        files.tokenizer, task, text, position=position, date=date, name=names.text
    )
    return _checked(files, task, ids, at, prompt, max_new_tokens, names)


def dialogue_request(
    files: BaseFiles,
    task: Task,
    messages: Messages,
    prompt: SoftPrompt | None,
    position: str,
    max_new_tokens: int | None,
    date: datetime.date | None,
    names: RequestNames = MESSAGES,
) -> GenerationRequest:
    """Make the request for the next answer in a dialogue, which the base's chat template writes.

    Args:
        messages: turns; the last one is not of the assistant.

    Raises:
        BadInput: the base has no chat template, the template rejects the dialogue, or as
            ``text_request``.
    """
    encoder = dialogue_encoder(files.tokenizer, task, date)
    try:
        turns = with_mark(with_system(messages, task.system), position.removeprefix(AFTER))
        ids, at = encoder.marked_opening(turns)
    except TemplateLimitExceeded as error:
        raise BadInput(f"base.model: {limit_problem(error)}") from None
    except ValueError as error:
        raise BadInput(f"messages: {error}") from None
    if position.startswith(AFTER):
        ids, at = ids[at:], 0
    return _checked(files, task, ids, at, prompt, max_new_tokens, names)


def _checked(
    files: BaseFiles,
    task: Task,
    ids: list[int],
    prompt_at: int,
    prompt: SoftPrompt | None,
    max_new_tokens: int | None,
    names: RequestNames,
) -> GenerationRequest:
    limit = task.max_new_tokens if max_new_tokens is None else max_new_tokens
    if limit < 1:
        raise BadInput(f"{names.limit}: {limit} is not a number of at least 1; raise it")
    virtual = 0 if prompt is None else prompt.num_virtual_tokens
    room = files.context_length - virtual - limit
    if room < 1:
        raise BadInput(
            f"{names.limit}: {limit} leaves no room for an input in the context of "
            f"{files.context_length} tokens; lower it"
        )
    if not 0 < len(ids) <= room:
        raise (TooLong if ids else BadInput)(
            f"{names.text}: has {len(ids)} tokens, but must have 1 to {room}, because {limit} new "
            f"ones follow; shorten it or lower {names.limit}"
        )
    if (largest := max(ids)) >= files.config.vocab_size:
        raise BadInput(
            f"{names.text}: contains {files.tokenizer.decode([largest])!r}, a token for which the "
            "base has no embedding; leave it out"
        )
    stop = StopCriteria.of(files.generation, files.tokenizer, task)
    return GenerationRequest(tuple(ids), prompt_at, prompt, stop, limit)
