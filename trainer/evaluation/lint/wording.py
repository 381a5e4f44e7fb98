"""Rules on words: filler, vague amounts, terms without a definition."""

from __future__ import annotations

import re
from collections.abc import Iterator

from trainer.evaluation.lint import words
from trainer.evaluation.lint.finding import Finding, TaskWords
from trainer.evaluation.lint.requests import begins_with_answer, requests_in
from trainer.evaluation.lint.text import WORD, Sentence

#: At least two capitals side by side: "PubMed" and "JavaScript" are names.
_ABBREVIATION = re.compile(r"\b(?=\w*[A-Z][A-Z0-9]*[A-Z])[A-Za-z][A-Za-z0-9]{1,7}(?:-\d+)?\b")


def filler(text: str, parts: list[Sentence], task: TaskWords) -> Iterator[Finding]:
    """Phrases that change nothing."""
    spans: list[tuple[int, int]] = []
    for pattern, rewrite in words.FILLERS.items():
        for match in words.phrase(pattern).finditer(text):
            if any(start <= match.start() and match.end() <= end for start, end in spans):
                continue
            spans.append(match.span())
            why = f"{match.group().strip(' ,')!r} costs tokens and says nothing to the model."
            yield Finding("filler", match.start(), match.end(), why, rewrite)


def vague_amount(text: str, parts: list[Sentence], task: TaskWords) -> Iterator[Finding]:
    """Amounts that every reader understands differently, in requests and constraints."""
    for sentence in parts:
        asks = next(requests_in(sentence), None) is not None or begins_with_answer(sentence)
        if not (asks or words.CONSTRAINT.search(sentence.text)):
            continue
        for pattern, rewrite in words.VAGUE.items():
            for match in words.phrase(pattern).finditer(sentence.text):
                start, end = sentence.start + match.start(), sentence.start + match.end()
                why = (
                    f"{match.group().strip(' ,')!r} has no fixed meaning; give a number or a list."
                )
                yield Finding("vague-amount", start, end, why, rewrite)


def undefined_term(text: str, parts: list[Sentence], task: TaskWords) -> Iterator[Finding]:
    """Abbreviations without a definition, and fashionable words with a plain one."""
    known = {word for choice in task.choices for word in WORD.findall(choice)}
    seen = set()
    for match in _ABBREVIATION.finditer(text):
        term = match.group()
        plain = term.removesuffix("s")
        if term in seen or term in known or {term, plain} & words.KNOWN or _spoken(match, text):
            continue
        seen.add(term)
        name = re.escape(term)
        if re.search(rf"\({name}s?\)|\b{name}\s*(?:\(|=|means|stands for|is short for)", text):
            continue
        why = f"{term!r} is never written out; a small model may know it by another meaning."
        rewrite = f"{term} (written out)"
        yield Finding("undefined-term", match.start(), match.end(), why, rewrite, measurable=False)
    for term, plain in words.JARGON.items():
        for match in words.any_of(re.escape(term)).finditer(text):
            why = f"{match.group()!r} is jargon; {plain!r} is in every model's vocabulary."
            yield Finding("undefined-term", match.start(), match.end(), why, plain)


def _spoken(match: re.Match[str], text: str) -> bool:
    """Whether capitals are no abbreviation.

    They are emphasis, a heading, a format such as "YYYY" or a number such as "IV".
    """
    term = match.group()
    lower = term.lower()
    before, after = text[: match.start()], text[match.end() :]
    if len(set(term)) == 1 or re.fullmatch("[IVX]+", term):
        return True
    if re.fullmatch("[A-Z]{6,}", term):
        return True  # abbreviations are shorter
    heading = re.search(r"(?:^|\n)[#*\s]*$", before) and re.match(r"[*\s]*:", after)
    beside = re.search(r"\b[A-Z]{2,} $", before) or re.match(r" [A-Z]{2,}\b", after)
    if term.isalpha() and (heading or beside):
        return True
    emphasis = term.isupper() and (
        lower in words.STOP_WORDS or lower in words.REQUESTS | words.ANSWERS
    )
    return emphasis or text.isupper() or bool(re.search(rf"\b{lower}\b", text))
