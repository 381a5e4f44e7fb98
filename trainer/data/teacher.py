"""Teacher of a distilled prompt: a long hard prompt whose output distributions the prompt learns.

The base reads the teacher like virtual tokens, once per packed batch, before all rows of its
prompts (prompt compression, Wingate et al. 2022, arXiv 2210.03162). Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from trainer.config import Prompt, RunConfig, split_template, template_fields
from trainer.data.row_validation import render
from trainer.data.token_table import Example
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
    """

    index: int
    token_ids: tuple[int, ...]
    num_special: int
    beginnings: Mapping[int, tuple[int, ...]] = field(default_factory=dict, compare=False)

    @property
    def num_tokens(self) -> int:
        """Maximum number of tokens by which the teacher lengthens a row."""
        longer = max(map(len, self.beginnings.values()), default=1) - 1
        return len(self.token_ids) - self.num_special + longer

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
        return replace(example, input_ids=(*begin, *rest), label_spans=spans, branches=branches)


def teachers_of(config: RunConfig, tokenizer: Any) -> dict[str, Teacher]:
    """Return the teacher of each distilled prompt, by prompt name; equal texts share one teacher.

    Raises ``BadInput`` if a text has no tokens.
    """
    if all(prompt.teacher is None for prompt in config.prompts):
        return {}
    teachers: dict[str, Teacher] = {}
    known: dict[tuple[int, tuple[int, ...]], Teacher] = {}
    encoder = TextTokenizer(tokenizer)
    num_special, beginnings = len(encoder.front), encoder.beginnings()
    for prompt in config.prompts:
        if prompt.teacher is None:
            continue
        halves = split_template(config.task(prompt.task).input)
        if halves is None:
            ids = encoder.inputs([prompt.teacher])[0]
            teacher = Teacher(len(known), tuple(ids), num_special, beginnings)
        else:
            context = "" if template_fields(halves[0]) else render(halves[0], {})
            (ids,), _ = encoder.targets([context], encoder.inputs([context]), [prompt.teacher])
            teacher = Teacher(len(known), tuple(ids), 0)
        if len(ids) <= teacher.num_special:
            raise BadInput(f"prompts.{prompt.name}.teacher: has no tokens; write some words")
        key = teacher.num_special, teacher.token_ids
        teachers[prompt.name] = known.setdefault(key, teacher)
    return teachers


def merge_warnings(prompts: Sequence[Prompt], tokenizer: Any, row: str) -> list[str]:
    """Return warnings about teachers whose text the tokenizer merges with the input of a row."""
    return [
        f"prompts.{prompt.name}.teacher: the tokenizer merges its end with the beginning of the "
        "rows; they are tokenized separately: end it with a word or a line break, without a space"
        for prompt in prompts
        if prompt.teacher is not None and TextTokenizer(tokenizer).merges(prompt.teacher, row)
    ]
