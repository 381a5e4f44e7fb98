"""Teacher of a distilled prompt: a long hard prompt whose output distributions the prompt learns.

The base reads the teacher like virtual tokens, once per packed batch, before all rows of its
prompts (prompt compression, Wingate et al. 2022, arXiv 2210.03162). Imports no torch.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from trainer.config import Prompt, RunConfig, Task, split_template, template_fields
from trainer.data.row_validation import render
from trainer.data.token_table import Example
from trainer.data.tokenization.chat_template import TemplateLimitExceeded
from trainer.data.tokenization.dialogue_rows import (
    dialogue_encoder,
    limit_problem,
    user_messages,
)
from trainer.data.tokenization.message_edits import with_mark
from trainer.data.tokenization.tokenizer import TextTokenizer
from trainer.runtime.errors import BadInput


@dataclass(frozen=True)
class Teacher:
    """A hard prompt as tokens.

    Attributes:
        index: among the distinct teachers of a run.
        token_ids: special tokens at the beginning of a text, then the teacher's text.
        num_special: number of these special tokens. Rows omit theirs after the teacher. 0 if the
            task's input has ``{virtual_tokens}``, where the teacher's text is inserted.
        beginnings: token at the beginning of a row -> its tokens after the teacher's text; only for
            tokenizers that put a space before every text.
        replaced: tokens at the beginning of every dialogue in place of which the teacher is read:
            what the chat template writes before the user's text, without and with the teacher as
            text of the system.
        position: ``prompts.position`` of the prompt, which determines the tokens of its rows.
    """

    index: int
    token_ids: tuple[int, ...]
    num_special: int
    beginnings: Mapping[int, tuple[int, ...]] = field(default_factory=dict, compare=False)
    replaced: tuple[int, ...] = ()
    position: str = "front"

    @property
    def num_tokens(self) -> int:
        """Maximum number of tokens by which the teacher lengthens a row."""
        longer = max(map(len, self.beginnings.values()), default=1) - 1
        return max(0, len(self.token_ids) - self.num_special + longer)

    def continued_by(self, example: Example) -> Example:
        """Return a row as tokenized after the teacher's text; the labels are the same tokens."""
        first, *rest = example.input_ids[self.num_special :]
        begin = self.beginnings.get(first, (first,))
        start = example.target_start - self.num_special
        if not begin and start == 1:  # the first label is predicted by a token of the row
            begin = (first,)
        shift = self.num_special + 1 - len(begin)
        spans = tuple((start - shift, stop - shift) for start, stop in example.label_spans)
        assert start > 0, "the first label is predicted by a token of the row"
        branches = tuple((start - shift, at - shift) for start, at in example.branches)
        return replace(
            example,
            input_ids=(*begin, *rest),
            label_spans=spans,
            branches=branches,
            prompt_at=max(0, example.prompt_at - self.num_special),
            prompt_end=max(0, example.prompt_end - self.num_special),
        )


def teachers_of(
    config: RunConfig, tokenizer: Any, date: datetime.date | None = None
) -> dict[str, Teacher]:
    """Return the teacher of each distilled prompt, by prompt name; equal texts share one teacher.

    Args:
        date: the date that a chat template reads; None: today.

    Raises:
        BadInput: a text has no tokens, or the chat template cannot write it as the system's.
    """
    if all(prompt.teacher is None for prompt in config.prompts):
        return {}
    teachers: dict[str, Teacher] = {}
    known: dict[tuple[Any, ...], Teacher] = {}
    encoder = TextTokenizer(tokenizer)
    num_special, beginnings = len(encoder.front), encoder.beginnings()
    for prompt in config.prompts:
        if prompt.teacher is None:
            continue
        task = config.task(prompt.task)
        halves = split_template(task.input)
        if halves is None and task.is_chat:
            replaced, ids = _as_system(prompt, task, tokenizer, date)
            more: Any = {"replaced": tuple(replaced), "position": prompt.position}
            teacher = Teacher(len(known), tuple(ids), len(replaced), **more)
        elif halves is None:
            ids = encoder.inputs([prompt.teacher])[0]
            teacher = Teacher(len(known), tuple(ids), num_special, beginnings)
        else:
            context = "" if template_fields(halves[0]) else render(halves[0], {})
            (ids,), _ = encoder.targets([context], encoder.inputs([context]), [prompt.teacher])
            teacher = Teacher(len(known), tuple(ids), 0)
        empty = teacher.replaced or tuple(encoder.front)[: teacher.num_special]
        if teacher.token_ids == empty:
            problem = "has no tokens; write some words"
            if teacher.replaced:
                problem = "the chat template ignores turns of the system; use one that writes them"
            raise BadInput(f"prompts.{prompt.name}.teacher: {problem}")
        key = teacher.num_special, teacher.token_ids, teacher.replaced, teacher.position
        teachers[prompt.name] = known.setdefault(key, teacher)
    return teachers


def _as_system(
    prompt: Prompt, task: Task, tokenizer: Any, date: datetime.date | None
) -> tuple[list[int], list[int]]:
    """Return the tokens before the user's text, without and with the teacher as the system's text.

    White space at their end stays with the row if both have it, because it often belongs to the
    following token.
    """
    setting = f"prompts.{prompt.name}.teacher"
    encoder = dialogue_encoder(tokenizer, task, date)
    try:
        probes = [user_messages(task, text) for text in ("x", "y")]
        marked = [with_mark(messages, prompt.position) for messages in probes]
        taught = [user_messages(task, text, prompt.teacher) for text in ("x", "y")]
        (before, rest), (before_taught, rest_taught) = map(encoder.beginning, (marked, taught))
    except TemplateLimitExceeded as error:
        raise BadInput(f"{setting}: {limit_problem(error)}") from None
    except ValueError as error:
        raise BadInput(f"{setting}: {error}") from None
    if rest != rest_taught:
        raise BadInput(
            f"{setting}: the chat template changes the dialogue after the system's text, so the "
            "labels of teacher and prompt would differ; write the dialogue with input and target"
        )
    space = before[len(before.rstrip()) :]
    if before_taught.endswith(space):
        cut = len(space)
        before, before_taught = before[: len(before) - cut], before_taught[: -cut or None]
    return encoder.ids(before), encoder.ids(before_taught)


def merge_warnings(prompts: Sequence[Prompt], tokenizer: Any, row: str) -> list[str]:
    """Return warnings about teachers whose text the tokenizer merges with the input of a row."""
    return [
        f"prompts.{prompt.name}.teacher: the tokenizer merges its end with the beginning of the "
        "rows; they are tokenized separately: end it with a word or a line break, without a space"
        for prompt in prompts
        if prompt.teacher is not None and TextTokenizer(tokenizer).merges(prompt.teacher, row)
    ]
