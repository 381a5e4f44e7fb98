"""``prompts.position: auto``: place of the virtual tokens in dialogues of a chat template."""

from __future__ import annotations

import datetime
import itertools
from collections.abc import Mapping
from typing import Any

from trainer.config import RunConfig, Task
from trainer.data.tokenization.chat_template import Messages, TemplateLimitExceeded
from trainer.data.tokenization.dialogue_rows import (
    dialogue_encoder,
    ids_before_place,
    limit_problem,
    user_messages,
)
from trainer.data.tokenization.message_edits import with_mark
from trainer.runtime.errors import BadInput


def with_positions(
    config: RunConfig,
    tokenizer: Any,
    date: datetime.date | None = None,
    saved: Mapping[str, str] | None = None,
) -> RunConfig:
    """Return the settings of a run with a position instead of ``auto``.

    Args:
        date: the date that a chat template reads; None: today.
        saved: positions of the run's checkpoint, by prompt; they have priority.

    Raises:
        BadInput: the chat template is missing or exceeds its limits.
    """
    saved, by_task = saved or {}, dict[str, str]()
    prompts = []
    for prompt in config.prompts:
        if prompt.position != "auto":
            prompts.append(prompt)
            continue
        position = saved.get(prompt.name)
        if position is None and prompt.task not in by_task:
            by_task[prompt.task] = _position(config.task(prompt.task), tokenizer, date)
        position = position or by_task[prompt.task]
        prompts.append(prompt.model_copy(update={"position": position}))
    return config.model_copy(update={"prompts": prompts})


def texts_before(
    config: RunConfig, tokenizer: Any, date: datetime.date | None = None
) -> dict[str, list[int]]:
    """Return the tokens that precede keys and values inside a dialogue, by prompt name.

    Args:
        config: without ``position: auto``.
        date: the date that a chat template reads; None: today.
    """
    texts = dict[str, list[int]]()
    for prompt in config.prompts:
        if prompt.placement != prompt.position:
            task = config.task(prompt.task)
            encoder = dialogue_encoder(tokenizer, task, date)
            texts[prompt.name] = ids_before_place(encoder, task, prompt.position)
    return texts


def _position(task: Task, tokenizer: Any, date: datetime.date | None) -> str:
    """Return the first turn, of system and user, in which the template writes virtual tokens."""
    encoder = dialogue_encoder(tokenizer, task, date)
    asked: Messages = user_messages(task, "x")
    answer = {"role": "assistant", "content": "y"}
    dialogues: list[Messages] = []
    # Some generation prompts open a block of reasoning, which an answer without it does not close.
    for turn in (answer, answer | {"reasoning_content": "z"}):
        dialogue: Messages = [*asked, turn]
        if task.messages is not None:  # some templates write it before the last question
            dialogue = [*dialogue, *dialogue]
        dialogues.append(dialogue)
    for position, dialogue in itertools.product(("system", "user"), dialogues):
        try:
            encoder(with_mark(dialogue, position))
        except TemplateLimitExceeded as error:
            name = "messages" if task.messages is not None else "chat"
            raise BadInput(f"tasks.{task.name}.{name}: {limit_problem(error)}") from None
        except ValueError:
            continue
        return position
    return "front"
