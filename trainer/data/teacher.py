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
from trainer.data.tokenization.message_edits import MARK, with_mark
from trainer.data.tokenization.tokenizer import TextTokenizer
from trainer.runtime.errors import BadInput


@dataclass(frozen=True)
class Teacher:
    """A hard prompt as tokens.

    Attributes:
        index: among the distinct teachers of a run.
        token_ids: the text that the base reads in place of the first tokens of a row: special
            tokens, fixed text before ``{virtual_tokens}`` if it merges with the teacher, and the
            teacher's text.
        num_special: number of these first tokens, which rows omit after the teacher. 0 if the
            teacher's text is inserted at ``{virtual_tokens}``.
        beginnings: token at the beginning of a row -> its tokens after the teacher's text; only for
            tokenizers that put a space before every text.
        replaced: the first ``num_special`` tokens of every row if they are more than special
            tokens: what the chat template writes before the user's text, or the fixed text before
            ``{virtual_tokens}``.
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
        fixed = example.prompt_end > self.num_special  # text after the prompt is shared
        return replace(
            example,
            input_ids=(*begin, *rest),
            label_spans=spans,
            branches=branches,
            prompt_at=max(0, example.prompt_at - self.num_special),
            prompt_end=example.prompt_end - shift if fixed else 0,
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
        if not task.is_chat and (halves is None or not halves[0]):
            ids = encoder.inputs([prompt.teacher])[0]
            teacher = Teacher(len(known), tuple(ids), num_special, beginnings)
        else:
            place = _as_system if halves is None else _at_virtual_tokens
            replaced, ids = place(prompt, task, tokenizer, date)
            more: Any = {"replaced": tuple(replaced), "position": prompt.position}
            teacher = Teacher(len(known), tuple(ids), len(replaced), **more)
        empty = teacher.replaced or tuple(encoder.front)[: teacher.num_special]
        if teacher.token_ids == empty:
            problem = "has no tokens; write some words"
            if teacher.replaced and halves is None:
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


def _at_virtual_tokens(
    prompt: Prompt, task: Task, tokenizer: Any, date: datetime.date | None
) -> tuple[list[int], list[int]]:
    """Return the tokens that the teacher replaces, and the tokens that it replaces them with.

    It replaces the fixed text before ``{virtual_tokens}`` if the tokenizer merges the two, as it
    merges a space with the next word. Otherwise the teacher's text is inserted and replaces
    nothing.
    """
    text, encoder = str(prompt.teacher), TextTokenizer(tokenizer)
    columns, (half, _) = template_fields(task.input), split_template(task.input) or ("", "")
    before = render(half, dict.fromkeys(columns, "x"))
    if template_fields(half):  # the text before differs between rows
        (inserted,), _ = encoder.targets([before], encoder.inputs([before]), [text])
        return [], inserted
    if task.is_chat:
        dialogues = dialogue_encoder(tokenizer, task, date)
        inputs = [render(task.input, dict.fromkeys(columns, probe), MARK) for probe in ("x", "y")]
        try:
            written, _ = dialogues.beginning([user_messages(task, i) for i in inputs])
        except TemplateLimitExceeded as error:
            raise BadInput(f"prompts.{prompt.name}.teacher: {limit_problem(error)}") from None
        except ValueError as error:
            raise BadInput(f"prompts.{prompt.name}.teacher: {error}") from None
        before, _, _ = written.partition(MARK)
        own, joined = dialogues.ids(before), dialogues.ids(before + text)
    else:
        own, joined = encoder.inputs([before, before + text])
    return ([], joined[len(own) :]) if joined[: len(own)] == own else (own, joined)


def merge_warnings(
    task: Task, prompts: Sequence[Prompt], tokenizer: Any, row: Mapping[str, Any]
) -> list[str]:
    """Return warnings about teachers whose text the tokenizer merges with text around it.

    Args:
        row: a row of the task, which has input and target.
    """
    encoder = TextTokenizer(tokenizer)
    halves = split_template(task.input) or ("", task.input)
    before, after = (render(half, row) for half in halves)

    def merges(teacher: str) -> bool:
        # Fixed text before the teacher is tokenized together with it.
        is_row = bool(template_fields(halves[0])) and encoder.merges(before, teacher)
        return is_row or encoder.merges(before + teacher, after)

    return [
        f"prompts.{prompt.name}.teacher: the tokenizer merges it with the text of the rows around "
        "it; they are tokenized separately: end both with a word or a line break, without a space"
        for prompt in prompts
        if prompt.teacher is not None and merges(prompt.teacher)
    ]
