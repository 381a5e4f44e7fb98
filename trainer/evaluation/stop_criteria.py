"""Find the end of a generated text, and decode its token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import GenerationConfig, PreTrainedTokenizerBase

from trainer.config import Task
from trainer.data.row_validation import MAX_PROBLEMS
from trainer.data.task_data import EvalSet, TaskData
from trainer.data.text_readers import shorten
from trainer.model.generation_config import end_ids
from trainer.runtime.errors import BadInput


@dataclass(frozen=True)
class StopCriteria:
    """End tokens and stop strings of a generated text.

    Attributes:
        token_ids: end tokens; they are not part of the text.
        strings: stop strings; the text ends before the first occurrence of any of them.
    """

    tokenizer: PreTrainedTokenizerBase
    token_ids: frozenset[int]
    strings: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, config: GenerationConfig, tokenizer: PreTrainedTokenizerBase, task: Task
    ) -> StopCriteria:
        """Combine a task's stop strings with the end tokens and stop strings of the base model."""
        ids: set[int | None] = set(end_ids(config))
        if not task.is_chat and task.append_eos:
            ids.add(tokenizer.eos_token_id)  # the end of every target
        stop = config.stop_strings or []
        strings = [*task.stop, *([stop] if isinstance(stop, str) else stop)]
        return cls(tokenizer, frozenset(i for i in ids if i is not None), tuple(strings))

    def cut(self, ids: Sequence[int]) -> list[int]:
        """Return the tokens before the first end token."""
        end = next((i for i, token in enumerate(ids) if token in self.token_ids), len(ids))
        return list(ids[:end])

    def is_reached(self, ids: Sequence[int]) -> bool:
        """Whether these tokens contain an end token or, as text, a stop string."""
        return not self.token_ids.isdisjoint(ids) or self._has_stop(ids)

    def target(self, ids: Sequence[int]) -> str:
        """Decode a row's target as ``text`` decodes generated tokens.

        Stop strings do not cut the target; ``check_targets`` refuses a target that contains one.
        """
        return self._decode(self.cut(ids))

    def text(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """Decode tokens from ``generate``, without the end.

        Special tokens are kept by default, because they may be labels.
        """
        return before_stop(self._decode(self.cut(ids), skip_special_tokens), self.strings)

    def is_completed(self, ids: Sequence[int]) -> bool:
        """Whether the last token is an end token or completes a stop string.

        Decodes only as many tokens as a stop string can have, so the cost is constant.
        """
        if ids[-1] in self.token_ids:
            return True
        num_bytes = max((len(string.encode()) for string in self.strings), default=0)
        # A token has at least one byte; decoding may drop some at the start, hence 8 more.
        return self._has_stop(ids[-num_bytes - 8 :]) and self._has_stop(ids)

    def _has_stop(self, ids: Sequence[int]) -> bool:
        text = self._decode(ids) if self.strings else ""
        return any(string in text for string in self.strings)

    def _decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        text = self.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        assert isinstance(text, str)
        return text


def before_stop(text: str, strings: Sequence[str]) -> str:
    """Return the text before the first occurrence of any of the strings."""
    return text[: min((i for s in strings if (i := text.find(s)) >= 0), default=len(text))]


def check_targets(rows: EvalSet, stop: StopCriteria) -> str | None:
    """Check that targets can be generated, for a task whose metric compares texts.

    Returns:
        A warning if no target ends with an end token or a stop string.

    Raises:
        BadInput: a target contains a stop string, so generation would end too early.
    """
    task = rows.task
    if task.metric not in ("exact_match", "f1"):
        return None
    examples = [c[right] for c, right in zip(rows.candidates, rows.gold, strict=True)]
    targets = [e.input_ids[slice(*e.last_target)] for e in examples]
    problems = []
    for example, ids in zip(examples, targets, strict=True) if stop.strings else ():
        text = stop.tokenizer.decode(stop.cut(ids), skip_special_tokens=True)
        if before_stop(text, stop.strings).strip() != text.strip():
            problems.append(
                f"{rows.rows.where(example.row)}: its target {shorten(text)} contains a string of "
                f"tasks.{task.name}.stop, so it cannot be generated; remove the row or the string"
            )
    if problems:
        more = len(problems) - MAX_PROBLEMS
        raise BadInput(problems[:MAX_PROBLEMS] + ([f"and {more} more rows"] if more > 0 else []))
    if any(stop.is_reached(ids) for ids in targets):
        return None
    return (
        f"tasks.{task.name}: no target has an end at which generation stops (end tokens: "
        f"{sorted(stop.token_ids) or 'none'}, as generation_config.json of base.model lists "
        f"them), so every text has max_new_tokens={task.max_new_tokens} tokens and "
        f"{task.metric} counts all of it; set tasks.{task.name}.stop, for example to the mark "
        "that ends a turn"
    )


def check_all_targets(
    tasks: Mapping[str, TaskData],
    tokenizer: PreTrainedTokenizerBase,
    generation: GenerationConfig,
) -> None:
    """Check that targets that are compared with generated texts can be generated.

    Adds warnings to the tasks.

    Raises:
        BadInput: with the problems of all tasks.
    """
    problems: list[str] = []
    for data in tasks.values():
        ending = StopCriteria.of(generation, tokenizer, data.task)
        for rows in data.evaluation.values():
            try:
                warning = check_targets(rows, ending)
            except BadInput as error:
                problems += error.problems
                continue
            if warning is not None and warning not in data.warnings:
                data.warnings.append(warning)
    if problems:
        raise BadInput(problems)
