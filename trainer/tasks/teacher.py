"""What a distilled prompt learns from: a long hard prompt that the base reads in its place.

The base reads it as it reads virtual tokens, once per stream: word embeddings of the teacher's text
in front of all rows that it teaches (prompt compression, Wingate et al. 2022, arXiv 2210.03162).
Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trainer.config import RunConfig
from trainer.errors import BadInput
from trainer.tasks.table import Example
from trainer.tasks.tokens import encode_input


@dataclass(frozen=True)
class Teacher:
    """A hard prompt as tokens.

    Attributes:
        index: among the different teachers of a run.
        token_ids: the special tokens in front of a text, then the teacher's own.
        skipped: tokens of every row that these stand for: its special tokens in front.
    """

    index: int
    token_ids: tuple[int, ...]
    skipped: int

    @property
    def num_tokens(self) -> int:
        """Tokens of context that a row behind the teacher has less."""
        return len(self.token_ids) - self.skipped

    def behind(self, example: Example) -> Example:
        """A row as it stands behind the teacher; its labels are the same tokens."""
        cut = self.skipped
        spans = tuple((start - cut, stop - cut) for start, stop in example.label_spans)
        assert spans[0][0] > 0, "the first label is predicted by a token of the row"
        return Example(example.input_ids[cut:], spans, example.row)


def teachers_of(config: RunConfig, tokenizer: Any) -> dict[str, Teacher]:
    """The teacher of every distilled prompt, by its name; prompts with one text share a teacher.

    Raises:
        BadInput: if a teacher's text has no tokens.
    """
    teachers: dict[str, Teacher] = {}
    known: dict[tuple[int, ...], Teacher] = {}
    front = len(encode_input(tokenizer, ""))
    for prompt in config.prompts:
        if prompt.teacher is None:
            continue
        ids = tuple(encode_input(tokenizer, prompt.teacher))
        if len(ids) <= front:
            raise BadInput(f"prompts.{prompt.name}.teacher: has no tokens; write some words")
        teachers[prompt.name] = known.setdefault(ids, Teacher(len(known), ids, front))
    return teachers
