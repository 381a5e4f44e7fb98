"""What a distilled prompt learns from: a long hard prompt that the base reads in its place.

The base reads it as it reads virtual tokens, once per packed batch: word embeddings of the
teacher's text in front of all rows that it teaches (prompt compression, Wingate et al. 2022, arXiv
2210.03162). Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trainer.config import RunConfig
from trainer.data.token_table import Example
from trainer.data.tokenization.tokenizer import TextTokenizer
from trainer.runtime.errors import BadInput


@dataclass(frozen=True)
class Teacher:
    """A hard prompt as tokens.

    Attributes:
        index: among the different teachers of a run.
        token_ids: the special tokens in front of a text, then the teacher's own.
        skipped: tokens of every row that these stand for: its special tokens in front.
        beginnings: tokens that begin a row, each as it is behind the teacher's text; only of
            tokenizers that put a space in front of every text.
    """

    index: int
    token_ids: tuple[int, ...]
    skipped: int
    beginnings: Mapping[int, tuple[int, ...]] = field(default_factory=dict, compare=False)

    @property
    def num_tokens(self) -> int:
        """Tokens of context that a row behind the teacher has less."""
        longer = max(map(len, self.beginnings.values()), default=1) - 1
        return len(self.token_ids) - self.skipped + longer

    def behind(self, example: Example) -> Example:
        """A row as it stands behind the teacher; its labels are the same tokens."""
        first, *rest = example.input_ids[self.skipped :]
        begin = self.beginnings.get(first, (first,))
        start = example.target_start - self.skipped
        if not begin and start == 1:  # the first label is predicted by a token of the row
            begin = (first,)
        shift = self.skipped + 1 - len(begin)
        spans = tuple((start - shift, stop - shift) for start, stop in example.label_spans)
        assert start > 0, "the first label is predicted by a token of the row"
        return Example((*begin, *rest), spans, example.row)


def teachers_of(config: RunConfig, tokenizer: Any) -> dict[str, Teacher]:
    """The teacher of every distilled prompt, by its name; prompts with one text share a teacher.

    Raises:
        BadInput: if a teacher's text has no tokens.
    """
    teachers: dict[str, Teacher] = {}
    known: dict[tuple[int, ...], Teacher] = {}
    texts = {prompt.name: prompt.teacher for prompt in config.prompts if prompt.teacher is not None}
    if not texts:
        return {}
    encoder = TextTokenizer(tokenizer)
    front, beginnings = len(encoder.front), encoder.beginnings()
    for name, text in texts.items():
        ids = tuple(encoder.inputs([text])[0])
        if len(ids) <= front:
            raise BadInput(f"prompts.{name}.teacher: has no tokens; write some words")
        teachers[name] = known.setdefault(ids, Teacher(len(known), ids, front, beginnings))
    return teachers


def merge_warning(name: str, text: str, tokenizer: Any, row: str) -> str | None:
    """What to warn of where a teacher's text and a row have other tokens apart than joined.

    Args:
        name: of the prompt.
        row: the input of one.
    """
    if not TextTokenizer(tokenizer).merges(text, row):
        return None
    return (
        f"prompts.{name}.teacher: the tokenizer merges its end with the beginning of the rows; "
        "they are tokenized apart: end it with a word or a line break, without a space"
    )
