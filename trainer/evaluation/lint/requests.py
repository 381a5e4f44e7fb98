"""Clauses that ask for a result, and sentences that say how to answer."""

from __future__ import annotations

import re
from collections.abc import Iterator

from trainer.evaluation.lint import words
from trainer.evaluation.lint.text import WORD, Sentence

_CLAUSE = re.compile(
    r"(?:^|[,;:]|\band\b|\bthen\b|\balso\b|\bas well as\b|\bor\b)\s*", re.IGNORECASE
)


def requests_in(sentence: Sentence) -> Iterator[int]:
    """Yield the places of the verbs that ask for a result."""
    for clause in _CLAUSE.finditer(sentence.text):
        place = clause.end()
        place += polite.end() if (polite := words.POLITE.match(sentence.text[place:])) else 0
        following = [m.group().lower() for m in WORD.finditer(sentence.text[place : place + 60])]
        if len(following) < 2 or following[0] not in words.REQUESTS:
            continue
        opens = clause.start() == 0 or clause.group().startswith((";", ":"))
        if following[0] in words.ANSWERS and following[1] in words.ANSWER_STARTS:
            continue  # says how to answer
        is_verb = opens or following[0] not in words.ALSO_NOUNS
        if is_verb or following[1] in words.NOUN_STARTS:
            yield place


def begins_with_answer(sentence: Sentence) -> bool:
    """Whether a sentence says how to answer."""
    return sentence.words[0] in words.ANSWERS
