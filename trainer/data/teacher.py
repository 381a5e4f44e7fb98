"""Teacher of a distilled prompt: a long hard prompt whose output distributions the prompt learns.

The base reads the teacher like virtual tokens, once per packed batch, before all rows of its
prompts (prompt compression, Wingate et al. 2022, arXiv 2210.03162). Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainer.config import Prompt, RunConfig
from trainer.data.token_table import Example
from trainer.data.tokenization.tokenizer import TextTokenizer
from trainer.runtime.errors import BadInput


@dataclass(frozen=True)
class Teacher:
    """A hard prompt as tokens.

    Attributes:
        index: among the distinct teachers of a run.
        token_ids: special tokens at the beginning of a text, then the teacher's text.
        num_special: number of these special tokens. Rows omit theirs after the teacher.
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
        return Example((*begin, *rest), spans, example.row)


def teachers_of(config: RunConfig, tokenizer: Any) -> dict[str, Teacher]:
    """Return the teacher of each distilled prompt, by prompt name; equal texts share one teacher.

    Raises ``BadInput`` if a text has no tokens.
    """
    texts = {prompt.name: prompt.teacher for prompt in config.prompts if prompt.teacher is not None}
    if not texts:
        return {}
    teachers: dict[str, Teacher] = {}
    by_ids: dict[tuple[int, ...], Teacher] = {}
    encoder = TextTokenizer(tokenizer)
    num_special, beginnings = len(encoder.front), encoder.beginnings()
    for name, text in texts.items():
        ids = tuple(encoder.inputs([text])[0])
        if len(ids) <= num_special:
            raise BadInput(f"prompts.{name}.teacher: has no tokens; write some words")
        teacher = Teacher(len(by_ids), ids, num_special, beginnings)
        teachers[name] = by_ids.setdefault(ids, teacher)
    return teachers


def merge_warnings(prompts: Sequence[Prompt], tokenizer: Any, row: str) -> list[str]:
    """Return warnings about teachers whose text the tokenizer merges with the input of a row."""
    return [
        f"prompts.{prompt.name}.teacher: the tokenizer merges its end with the beginning of the "
        "rows; they are tokenized separately: end it with a word or a line break, without a space"
        for prompt in prompts
        if prompt.teacher is not None and TextTokenizer(tokenizer).merges(prompt.teacher, row)
    ]
