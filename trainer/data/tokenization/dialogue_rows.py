"""Rows of dialogues -> examples within the context. Needs a tokenizer, but no torch.

A row is a column of messages, or an input and a target that become a user's turn and its answer
(``chat: true``).
"""

from __future__ import annotations

import datetime
from bisect import bisect_left
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from itertools import takewhile
from typing import Any

from trainer.config import Task, split_template, template_fields
from trainer.config.prompt import AFTER
from trainer.data.column_parsers import content_of, is_learned
from trainer.data.examples_in_context import example_turns
from trainer.data.row_validation import render
from trainer.data.token_table import Example
from trainer.data.tokenization.chat import Dialogue, DialogueEncoder
from trainer.data.tokenization.chat_template import Messages, TemplateLimitExceeded, Tools
from trainer.data.tokenization.message_edits import MARK, with_answer, with_mark, with_system
from trainer.data.tokenization.row_tokenizer import (
    RowTokenizer,
    TokenizationReport,
    common_length,
    problem_of_choices,
)
from trainer.data.tokenization.template_syntax import variable_problem
from trainer.runtime.errors import BadInput


def user_messages(task: Task, text: str, hard_prompt: str | None = None) -> Messages:
    """Return the turns before an answer: the system's text of the task, and a user's turn.

    Args:
        text: content of the user's turn.
        hard_prompt: text of the system in addition to that of the task.
    """
    messages: Messages = [{"role": "user", "content": text}]
    return with_system(with_system(messages, task.system), hard_prompt)


def dialogue_encoder(
    tokenizer: Any,
    task: Task,
    date: datetime.date | None = None,
    end_ids: Collection[int] = (),
) -> DialogueEncoder:
    """Return the encoder of a task's dialogues.

    Raises:
        BadInput: there is no chat template, it exceeds its limits, or it does not read a variable
            of ``chat_template_kwargs``.
    """
    name = "messages" if task.messages is not None else "chat"
    setting = f"tasks.{task.name}.{name}"
    if not tokenizer.chat_template:
        raise BadInput(
            f"{setting}: the tokenizer of base.model has no chat template; use a chat model, or "
            "input and target without chat"
        )
    try:
        encoder = DialogueEncoder(tokenizer, date, task.chat_template_kwargs, end_ids)
    except TemplateLimitExceeded as error:
        raise BadInput(f"{setting}: {limit_problem(error)}") from None
    problems = [
        f"tasks.{task.name}.chat_template_kwargs.{name}: {problem}"
        for name in task.chat_template_kwargs
        if (problem := variable_problem(name, encoder.template.sources))
    ]
    if problems:
        raise BadInput(problems)
    return encoder


def ids_before_place(encoder: DialogueEncoder, task: Task, position: str) -> list[int]:
    """Return the tokens with which the chat template begins, up to a ``prompts.position``."""
    ids, at = encoder.marked_opening(with_mark(user_messages(task, "x"), position))
    return ids[:at]


class DialogueRowTokenizer(RowTokenizer):
    """Tokenizes rows with a dialogue.

    Truncation removes the oldest turns, except those of the system. The rest begins with a user's
    turn and contains a learned turn. In a row of input and target, it removes the beginning of the
    longest column of the input; text of the templates and the target are never cut.

    Args:
        prefix: a hard prompt in the system's turn, or at ``{virtual_tokens}`` of the input.
        choices: candidates of the last answer, which is then the only learned turn; None: the
            row's own answers.
        position: ``Prompt.placement``.

    Raises:
        BadInput: as ``dialogue_encoder``.
    """

    def __init__(
        self,
        task: Task,
        tokenizer: Any,
        max_length: int,
        date: datetime.date | None = None,
        end_ids: Collection[int] = (),
        *,
        prefix: str = "",
        choices: Sequence[str] | None = None,
        position: str = "front",
    ) -> None:
        super().__init__(task, max_length)
        self.date, self.end_ids = date, end_ids
        self.prefix, self.choices, self.position = prefix, choices, position
        self.turn = position.removeprefix(AFTER)
        if prefix:
            self.limit = f"with tasks.{task.name}.hand_written {prefix!r}"
        self.encode = dialogue_encoder(tokenizer, task, date, end_ids)
        self._check_system()
        self.fixed = self._fixed_after_prompt()
        #: Tokens that every row begins with, which are in the prompt; None: they stay in the row.
        begins = position.startswith(AFTER)
        self.omitted = ids_before_place(self.encode, task, self.turn) if begins else None

    def _check_system(self) -> None:
        """Raise ``BadInput`` if the chat template ignores the text of the system."""
        setting = "system" if self.task.system is not None else "hand_written"
        if self.task.system is None and (not self.prefix or split_template(self.task.input)):
            return
        text = self.task.system or self.prefix
        turns: Messages = [{"role": "user", "content": "x"}]
        try:
            ignored = self.encode.opening(with_system(turns, text)) == self.encode.opening(turns)
        except ValueError:  # the template rejects turns of the system, which is reported by row
            return
        if ignored:
            raise BadInput(
                f"tasks.{self.task.name}.{setting}: the chat template ignores turns of the "
                "system; use base.chat_template with one that writes them, or remove it"
            )

    def check_choices(self, row: Mapping[str, Any]) -> None:
        """Raise ``BadInput`` if choices have equal tokens, or none."""
        report = TokenizationReport()
        if not self.examples(0, row, report):
            return  # the row has another problem, which is reported with those of other rows
        dialogues = self._encode_all(self._messages(row), self._tools(row))
        if problem := problem_of_choices(self.task, _answers(dialogues)):
            raise BadInput(f"tasks.{self.task.name}.choices: {problem}; use other words")

    def examples(
        self, row: int, values: Mapping[str, Any], report: TokenizationReport
    ) -> list[Example]:
        """Return the example of a row, or one per choice, which differ in the last answer."""
        column = self.task.messages or "chat"
        try:
            messages, tools = self._messages(values), self._tools(values)
            self._check_answer(messages)
            dialogues = self._encode_all(messages, tools)
            longest = max(dialogue.longest for dialogue in dialogues)
            if longest > self.max_length:
                if not self.may_truncate(row, longest, report):
                    return []
                if self.task.messages is None:
                    dialogues = self._cut_columns(values)
                else:
                    dialogues = self._truncate(messages, tools, longest)
                report.truncated += 1
            if not all(dialogue.spans for dialogue in dialogues):
                raise ValueError("the chat template shows no turn of the assistant")
            if any(self._begins_otherwise(dialogue) for dialogue in dialogues):
                raise ValueError(
                    "the text before the virtual tokens differs from that of other rows, which "
                    "method: prefix_tuning needs to be equal; use position: front"
                )
            if self.choices is not None:
                problem = problem_of_choices(self.task, _answers(dialogues))
                if problem:
                    raise ValueError(f"after its dialogue {problem}; use other words")
        except ValueError as error:
            report.add_problem(row, f"{column}: {error}")
            return []
        except TemplateLimitExceeded as error:  # presumably on every row, so stop at once
            raise BadInput(
                f"tasks.{self.task.name}.{column}: row {row + 1}: {limit_problem(error)}"
            ) from None
        if any(dialogue.merged for dialogue in dialogues):
            report.add_merged(row)
        if any(dialogue.omits for dialogue in dialogues):
            report.add_omitting(row)
        report.branched += any(dialogue.branches for dialogue in dialogues)
        return [self._example(dialogue, row) for dialogue in dialogues]

    def _example(self, dialogue: Dialogue, row: int) -> Example:
        ids, at = dialogue.ids, dialogue.prompt_at
        end = at + common_length(ids[at:], self.fixed)
        end = min([end, dialogue.spans[0][0], *(shared for _, shared in dialogue.branches)])
        example = Example(
            *(tuple(ids), tuple(dialogue.spans), row, at, max(at, end), tuple(dialogue.branches))
        )
        return example if self.omitted is None else example.from_place()

    def _begins_otherwise(self, dialogue: Dialogue) -> bool:
        return self.omitted is not None and dialogue.ids[: dialogue.prompt_at] != self.omitted

    def _messages(
        self, values: Mapping[str, Any], cut: Mapping[str, str] | None = None
    ) -> Messages:
        """Return the dialogue of a row, with the hard prompt or the mark of the virtual tokens.

        Args:
            cut: values of columns in the input, in place of those of the row.
        """
        if self.task.messages is not None:
            messages = with_system(values[self.task.messages], self.prefix or None)
        else:
            answer = {"role": "assistant", "content": render(self.task.target, values)}
            messages = [*self._asked({**values, **(cut or {})}), answer]
        messages = with_mark(messages, self.turn)
        system = sum(1 for _ in takewhile(lambda turn: turn["role"] == "system", messages))
        return [*messages[:system], *example_turns(self.task, values), *messages[system:]]

    def _asked(self, values: Mapping[str, Any]) -> Messages:
        """Return the turns before the answer of a row of input and target."""
        if split_template(self.task.input) is None:
            text = render(self.task.input, values)
            return user_messages(self.task, text, self.prefix or None)
        return user_messages(self.task, render(self.task.input, values, self.prefix or MARK))

    def _tools(self, values: Mapping[str, Any]) -> Tools:
        if self.task.messages is None or self.task.tools is None:
            return None
        tools: Tools = values.get(self.task.tools)
        return tools

    def _check_answer(self, messages: Messages) -> None:
        if self.task.messages is None or self.task.choices is None:
            return
        answer = content_of(messages[-1])
        if answer not in self.task.choices:
            raise ValueError(
                f"the last answer is {answer[:80]!r}, which is not one of the choices "
                f"{', '.join(map(repr, self.task.choices[:8]))}"
            )

    def _encode_all(self, messages: Messages, tools: Tools) -> list[Dialogue]:
        """Encode a dialogue with each candidate of its last answer, or with its own."""
        if self.choices is not None:
            return [self.encode(with_answer(messages, choice), tools) for choice in self.choices]
        if self.task.choices is not None:  # earlier answers are part of the input
            messages = with_answer(messages, content_of(messages[-1]))
        return [self.encode(messages, tools)]

    def _fixed_after_prompt(self) -> list[int]:
        """Return the tokens of fixed text between the virtual tokens and a row's own text."""
        probes = ["x", "y"]
        with suppress(ValueError):
            columns = template_fields(self.task.input)
            asked = [
                user_messages(self.task, probe)
                if self.task.messages is not None
                else self._asked(dict.fromkeys(columns, probe))
                for probe in probes
            ]
            marked = [with_mark(messages, self.turn) for messages in asked]
            if any(MARK in content_of(turn) for turn in marked[0]):
                return self.encode.fixed_after_mark(marked)
        return []

    def _cut_columns(self, values: Mapping[str, Any]) -> list[Dialogue]:
        """Remove as few tokens as possible at the beginning of the longest column of the input.

        If the rest does not fit with one token of it, the next longest column is cut as well.
        Raises ``ValueError`` if nothing fits.
        """
        texts = {name: str(values[name]) for name in template_fields(self.task.input)}
        cut, longest = dict[str, str](), 0
        for name in sorted(texts, key=lambda name: len(texts[name]), reverse=True):
            starts = self.encode.token_starts(texts[name])[1:]

            def length_from(start: int, name: str = name) -> int:
                dialogues = self._encode_all(
                    self._messages(values, cut | {name: texts[name][start:]}), None
                )
                return max(dialogue.longest for dialogue in dialogues)

            place = bisect_left(
                starts, True, key=lambda start: length_from(start) <= self.max_length
            )
            if starts:
                start = starts[min(place, len(starts) - 1)]
                longest, cut[name] = length_from(start), texts[name][start:]
            if place < len(starts):
                return self._encode_all(self._messages(values, cut), None)
        raise ValueError(
            f"it has {longest} tokens with one token of each column of the input; "
            f"{self.max_length} fit {self.limit}, and text of templates and the target are never "
            f"cut: shorten them, or set tasks.{self.task.name}.too_long to skip"
        )

    def _truncate(self, messages: Messages, tools: Tools, longest: int) -> list[Dialogue]:
        """Remove as few turns as possible so that the dialogue fits; raises ``ValueError``."""
        system = next(i for i, turn in enumerate(messages) if turn["role"] != "system")
        for start in range(system + 1, len(messages)):
            if messages[start]["role"] == "user" and any(map(is_learned, messages[start:])):
                kept: Messages = [*messages[:system], *messages[start:]]
                if self.turn == "user":
                    kept = with_mark(kept, self.turn)
                dialogues = self._encode_all(kept, tools)
                longest = max(dialogue.longest for dialogue in dialogues)
                if longest <= self.max_length:
                    return dialogues
        raise ValueError(
            f"its last exchange that is learned has {longest} tokens; {self.max_length} "
            f"fit {self.limit}, and a turn is never cut: shorten it, or set "
            f"tasks.{self.task.name}.too_long to skip"
        )


def limit_problem(error: TemplateLimitExceeded) -> str:
    return f"the chat template of base.model {error}; repair the template"


def _answers(dialogues: Sequence[Dialogue]) -> list[list[int]]:
    """Return the labels of each dialogue's last learned turn."""
    return [dialogue.ids[slice(*dialogue.spans[-1])] for dialogue in dialogues]
