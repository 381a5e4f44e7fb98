"""Clauses that ask for a result, and sentences that say how to answer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from trainer.evaluation.lint import words
from trainer.evaluation.lint.text import WORD, Sentence

_CLAUSE = re.compile(
    r"(?:^|[,;:]|\band\b|\bthen\b|\balso\b|\bas well as\b|\bor\b)\s*", re.IGNORECASE
)


def requests_in(sentence: Sentence) -> Iterator[int]:
    """Yield the places of the verbs that ask for a result."""
    begin = WORD.search(sentence.text)
    assert begin is not None
    text = sentence.text[begin.start() :]
    for clause in _CLAUSE.finditer(text):
        place = clause.end()
        place += polite.end() if (polite := words.POLITE.match(text[place:])) else 0
        place += adverb.end() if (adverb := words.ADVERB.match(text[place:])) else 0
        verb, *after = [m.group().lower() for m in WORD.finditer(text[place : place + 60])] or [""]
        if not after:
            continue
        opens = clause.start() == 0 or clause.group().startswith((";", ":"))
        is_verb = opens or verb not in words.ALSO_NOUNS or after[0] in words.NOUN_STARTS
        is_request = is_verb and verb in words.REQUESTS and not _says_how(verb, after)
        if is_request or (verb == "give" and after[0] in words.RECEIVERS):
            yield begin.start() + place


def _says_how(verb: str, after: Sequence[str]) -> bool:
    """Whether a verb with the words after it says how to answer: "write only", "list them"."""
    if verb in words.ANSWERS and after[0] in words.ANSWER_STARTS:
        return True
    return verb in words.PRESENT and words.BACK.match(" ".join(after)) is not None


def begins_with_answer(sentence: Sentence) -> bool:
    """Whether a sentence says how to answer; "If it has no date, write none" does, too."""
    first, *following = sentence.words
    is_label = re.match(r"\w+\s*:", sentence.text)
    if first in words.ANSWERS and not is_label:
        return first not in words.REQUESTS or set(following[:1]) <= words.ANSWER_STARTS
    if words.CASE.match(sentence.text) is None:
        return False
    later = [WORD.search(clause) for clause in re.split(r"[,:]", sentence.text)[1:]]
    return any(word is not None and word.group().lower() in words.ANSWERS for word in later)


def is_question(sentence: Sentence) -> bool:
    """Whether a sentence asks; a list of answers such as "Yes or no?" does not."""
    return sentence.text.endswith("?") and not words.QUESTION_WORDS.isdisjoint(sentence.words)
