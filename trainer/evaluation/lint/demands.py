"""Rules on demands: negative ones, and those that exclude each other."""

from __future__ import annotations

import re
from collections.abc import Iterator

from trainer.evaluation.lint import words
from trainer.evaluation.lint.finding import Finding, TaskWords, protected
from trainer.evaluation.lint.requests import begins_with_answer
from trainer.evaluation.lint.text import Sentence


def double_negation(text: str, parts: list[Sentence], task: TaskWords) -> Iterator[Finding]:
    """Two negative words in one clause."""
    first = r"\b(?:do not|don['’]t|does not|doesn['’]t|not|never|avoid|no)\b"
    second = "|".join(sorted(words.OPPOSITES, key=len, reverse=True))
    pattern = re.compile(rf"{first}((?:\s+[\w'’]+){{0,4}}?)\s+({second})\b", re.IGNORECASE)
    for match in pattern.finditer(text):
        between, negative = match.group(1), match.group(2).lower()
        if negative in {"no", "nothing", "none"} and not between.strip():
            continue  # "or not: no reason"
        if words.NEXT_CLAUSE.search(between):
            continue  # "answer no if the claim is incorrect"
        opposite = words.OPPOSITES[negative]
        kept = " ".join(part for part in (between.strip(), opposite) if part)
        why = f"{match.group()!r} has two negative words; a model often misses one of them."
        yield Finding("double-negation", match.start(), match.end(), why, kept)


def negative_only(text: str, parts: list[Sentence], task: TaskWords) -> Iterator[Finding]:
    """Forbidden things without a word on what to do instead."""
    for i, sentence in enumerate(parts):
        match = words.NEGATIVE.search(sentence.text)
        if match is None or _conditional(sentence.text, match.start()):
            continue
        if re.match(r"\s+(?:forget|fail|neglect|hesitate) to\b", sentence.text[match.end() :]):
            continue  # asks for something
        beside = [*parts[max(0, i - 1) : i], *parts[i + 1 : i + 2]]
        after = sentence.text[match.end() :]
        positive = re.search(r"\b(?:instead|rather|only|but)\b|;", after, re.IGNORECASE)
        answer = rf"[,:]\s+(?:[^,.]+,\s+)?(?:{'|'.join(sorted(words.ANSWERS))})\b"
        if positive or re.search(answer, after, re.IGNORECASE):
            continue
        if any(begins_with_answer(near) for near in beside):
            continue
        clause = re.search(r"[^,;.!?]*", sentence.text[match.start() :])
        assert clause is not None
        start = sentence.start + match.start()
        end = start + clause.end()
        why = "says what not to do, but not what to do instead."
        rewrite = _positive(clause.group()[match.end() - match.start() :].strip())
        subject = re.search(r"(?:[^\s,;:]+ )+$", sentence.text[: match.start()])
        if re.match("must|should", match.group(), re.IGNORECASE) and subject is not None:
            start = sentence.start + subject.start()  # "The answer must not"
        if start == sentence.start:
            rewrite = rewrite[:1].upper() + rewrite[1:]
        yield Finding("negative-only", start, end, f"{clause.group()!r} {why}", rewrite)


def _positive(forbidden: str) -> str:
    """Return a demand that says positively what not to do."""
    for pattern, positive in words.POSITIVE.items():
        match = re.fullmatch(pattern, forbidden, re.IGNORECASE)
        if match is not None:
            return match.expand(positive)
    return "answer only what is asked"


def names_the_unwanted(text: str, parts: list[Sentence], task: TaskWords) -> Iterator[Finding]:
    """Instructions that name the thing to avoid, which makes it more likely."""
    for match in words.UNWANTED.finditer(text):
        thing = match.group().strip(" ,")
        if words.FORM_NOUNS.search(thing):
            continue
        why = f"{thing!r} names what the answer must not contain; the model reads these words, too."
        end = match.end()
        if re.search(r"(?:^|[.!?\n])\s*$", text[: match.start()]) and text[end : end + 1] in ".!?":
            end += 1  # of a whole sentence
        yield Finding("names-the-unwanted", match.start(), end, why, "")


def _conditional(sentence: str, place: int) -> bool:
    """Whether a negation belongs to a condition or a quoted answer, such as "I don't know"."""
    before = sentence[:place]
    return bool(
        re.search(r"\b(?:if|when|unless|whether|that|who|which|I|you)\b[^,]*$", before)
    ) or (before.count('"') % 2 == 1 or before.count("'") % 2 == 1)


def contradiction(text: str, parts: list[Sentence], task: TaskWords) -> Iterator[Finding]:
    """Demands that exclude each other."""
    spans: set[tuple[int, int]] = set()
    for first, second in words.OPPOSED:
        one, other = (_demanded(text, pattern, task) for pattern in (first, second))
        if one is None or other is None:
            continue
        earlier, later = sorted((one, other), key=lambda match: match.start())
        if re.fullmatch(r"[\w\s,/]*(?:\bor\b|/)\s*", text[earlier.end() : later.start()], re.I):
            continue  # "formal or informal" are possible answers
        why = f"{one.group()!r} and {other.group()!r} exclude each other."
        start, end = _phrase_around(text, later)
        if (start, end) in spans:
            continue
        spans.add((start, end))
        apart = earlier.start() < start
        rewrite = "" if apart else f"({one.group()}, or {other.group()})"
        yield Finding("contradiction", start, end, why, rewrite, measurable=apart)
    most, least = (
        re.search(rf"\b{name} (\d+)", text, re.IGNORECASE) for name in ("at most", "at least")
    )
    if most and least and int(most.group(1)) < int(least.group(1)):
        why = f"{most.group()!r} and {least.group()!r} exclude each other."
        yield Finding("contradiction", least.start(), least.end(), why, most.group())


def _demanded(text: str, pattern: re.Pattern[str], task: TaskWords) -> re.Match[str] | None:
    """Return the first match that says how the answer is to be.

    Others are negated ("not brief"), describe the input ("the informal letter"), or are the name of
    a class or quoted.
    """
    spared = protected(text, task)
    other = re.compile(
        r"(?:\b(?:not|never|no|without|avoid)|n['’]t)\s+(?:\w+\s+)?$|"
        r"\b(?:the|this|that|these|those|from|replace|remove)\s+$",
        re.IGNORECASE,
    )
    for match in pattern.finditer(text):
        inside = any(start <= match.start() < end for start, end in spared)
        if not inside and other.search(text[: match.start()]) is None:
            return match
    return None


def _phrase_around(text: str, match: re.Match[str]) -> tuple[int, int]:
    """Extend a match to the comma, conjunction or end mark on both sides."""
    before = re.split(r"[.!?;\n]\s*|,\s*|\band\b\s*|\bbut\b\s*", text[: match.start()])[-1]
    start = match.start() - len(before)
    joint = re.search(r"(?:,?\s*(?:\b(?:and|but)\s+)?|\s+)$", text[:start])
    after = re.search(r"[.!?;,\n]|\s+(?:and|but)\b|$", text[match.end() :])
    assert after is not None
    at_start = joint is None or text[: joint.start()].rstrip()[-1:] in {"", ".", "!", "?", "\n"}
    end = match.end() + after.start()
    if at_start and text[end : end + 1] in {".", "!", "?", ","}:
        end += 1
    return (start if joint is None else joint.start()), end
