"""The rules of ``promptshard lint``.

Sources of the rules: the prompting guides of OpenAI, Anthropic and Google (one request, positive
instructions, a stated output format, concrete amounts); for the place of constraints, Liu and
others, Lost in the Middle (2307.03172).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from trainer.evaluation.lint import words
from trainer.evaluation.lint.text import WORD, Sentence, sentences, tidy

#: A sentence of more words is too long.
LONG_SENTENCE = 30
#: Rules about the length of a text look at texts of at least this many words.
LONG_TEXT = 40
#: A long text needs at least this many different content words per word.
LEAST_CONTENT = 0.3
#: A constraint can be in the middle of a text of at least this many sentences.
MIDDLE = 4
#: More class names than this do not belong into an instruction.
MOST_CHOICES = 20

_STOP_WORDS = words.listed(
    "a about all also an and any are as at be been but by can could do does for from had has "
    "have he her his how i if in into is it its just may me more most my no not of on one only "
    "or other our out she should so such than that the their them then there these they this "
    "those to up us was we were what when where which while who will with would you your"
)
_CLAUSE = re.compile(
    r"(?:^|[,;:]|\band\b|\bthen\b|\balso\b|\bas well as\b|\bor\b)\s*", re.IGNORECASE
)
_ABBREVIATION = re.compile(r"\b(?=\w*[A-Z]\w*[A-Z])[A-Za-z][A-Za-z0-9]{1,7}(?:-\d+)?\b")


@dataclass(frozen=True)
class TaskWords:
    """What the rules need to know of the task whose instruction they read.

    Attributes:
        choices: class names; empty without ``choices``.
        template: text of the input template around the columns, read after the instruction.
        num_virtual_tokens: length of the prompt that starts from the instruction.
        token_ends: returns the index of the end of every token of a text.
    """

    choices: Sequence[str] = ()
    template: str = ""
    num_virtual_tokens: int | None = None
    token_ends: Callable[[str], Sequence[int]] | None = None


@dataclass(frozen=True)
class Finding:
    """A part of an instruction that breaks a rule.

    Attributes:
        start, end: the part, ``text[start:end]``; empty at the end of the text if something is
            missing.
        why: one sentence for the author.
        rewrite: text that replaces the part.
        measurable: whether the rewrite is ready to use, without a place to fill in.
    """

    rule: str
    start: int
    end: int
    why: str
    rewrite: str
    measurable: bool = True

    def apply(self, text: str) -> str:
        """Return the instruction with the rewrite."""
        changed = tidy(text[: self.start] + self.rewrite + text[self.end :])
        return (
            changed
            if text[-1:] not in {"\n", " "}
            else changed.rstrip() + text[len(text.rstrip()) :]
        )


def lint(text: str, task: TaskWords | None = None) -> list[Finding]:
    """Return the findings of all rules, in the order of their places.

    Args:
        text: an instruction in words.
        task: what it is for; None: unknown.
    """
    task = task or TaskWords()
    if not WORD.search(text):
        return []
    parts = sentences(text)
    findings = [finding for rule in RULES.values() for finding in rule(text, parts, task)]
    return sorted(findings, key=lambda finding: (finding.start, finding.end, finding.rule))


def too_long(text: str, parts: list[Sentence], task: TaskWords) -> Iterator[Finding]:
    """Long sentences, and long texts that say little or repeat themselves."""
    for sentence in parts:
        count = len(sentence.words)
        if count > LONG_SENTENCE:
            why = f"{count} words in one sentence; a model follows shorter sentences more exactly."
            rewrite = _divided(sentence.text)
            ready = rewrite is not None
            rewrite = rewrite or "(two or three sentences)"
            yield Finding("too-long", sentence.start, sentence.end, why, rewrite, measurable=ready)
    content = [word for sentence in parts for word in sentence.words if word not in _STOP_WORDS]
    count = sum(len(sentence.words) for sentence in parts)
    if count >= LONG_TEXT and len(set(content)) < LEAST_CONTENT * count:
        why = f"{count} words, but only {len(set(content))} different ones with content."
        seen: set[str] = set()
        kept = []
        for sentence in parts:
            new = {word for word in sentence.words if word not in _STOP_WORDS} - seen
            kept += [sentence.text] * bool(new)
            seen |= new
        yield Finding("too-long", 0, len(text), why, " ".join(kept))


def _divided(sentence: str) -> str | None:
    """Divide a sentence at the joint nearest to its middle; None without one."""
    joints = re.finditer(r"(?:[,;]\s+(?:and|but|so|then)\s+|;\s+|,\s+(?:while|which)\s+)", sentence)
    nearest = min(joints, key=lambda m: abs(m.start() - len(sentence) / 2), default=None)
    if nearest is None:
        return None
    return f"{sentence[: nearest.start()]}. {tidy(sentence[nearest.end() :])}"


def split_requests(text: str, parts: list[Sentence], task: TaskWords) -> Iterator[Finding]:
    """Several requests in one instruction: each deserves a prompt of its own."""
    requests = [(s, place) for s in parts for place in _requests(s)]
    questions = [(s, 0) for s in parts if s.text.endswith("?") and s not in dict(requests)]
    requests = requests if len(requests) > 1 else questions
    if len(requests) < 2:
        return
    verbs = [text[s.start + place :].split()[0].strip(",.;:").lower() for s, place in requests]
    named = ", ".join(dict.fromkeys(verbs))
    why = f"{len(requests)} requests ({named}); the answers to each compete. Ask one per prompt."
    first = requests[0][0]
    same = [place for sentence, place in requests[1:] if sentence is first]
    if same:
        start = first.start + _clause_start(first.text, same[0])
        mark = "." if first.text[-1:] in ".!?" else ""
        yield Finding("split-requests", start, first.end, why, mark)
    for sentence in dict.fromkeys(s for s, _ in requests if s is not first):
        yield Finding("split-requests", sentence.start, sentence.end, why, "")


def _requests(sentence: Sentence) -> Iterator[int]:
    """Yield the places of the verbs that ask for a result."""
    for clause in _CLAUSE.finditer(sentence.text):
        place = clause.end()
        place += polite.end() if (polite := words.POLITE.match(sentence.text[place:])) else 0
        following = [m.group().lower() for m in WORD.finditer(sentence.text[place : place + 60])]
        if len(following) < 2 or following[0] not in words.REQUESTS:
            continue
        opens = clause.start() == 0 or clause.group().startswith((";", ":"))
        is_verb = opens or following[0] not in words.ALSO_NOUNS
        if is_verb or following[1] in words.NOUN_STARTS:
            yield place


def _clause_start(sentence: str, place: int) -> int:
    """Return the place of the comma or conjunction before a clause."""
    before = re.search(r"(?:[\s,;:]|\b(?:and|then|also|as well as|or)\b)+$", sentence[:place])
    assert before is not None
    return before.start()


def filler(text: str, parts: list[Sentence], task: TaskWords) -> Iterator[Finding]:
    """Phrases that change nothing."""
    for pattern, rewrite in words.FILLERS.items():
        for match in re.finditer(rf"(?<!\w){pattern}", text, re.IGNORECASE):
            why = f"{match.group().strip()!r} costs tokens and says nothing to the model."
            yield Finding("filler", match.start(), match.end(), why, rewrite)


def vague_amount(text: str, parts: list[Sentence], task: TaskWords) -> Iterator[Finding]:
    """Amounts that every reader understands differently, in requests and constraints."""
    for sentence in parts:
        asks = next(_requests(sentence), None) is not None or _begins_with_answer(sentence)
        if not (asks or words.CONSTRAINT.search(sentence.text)):
            continue
        for pattern, rewrite in words.VAGUE.items():
            for match in re.finditer(rf"(?<!\w){pattern}", sentence.text, re.IGNORECASE):
                start, end = sentence.start + match.start(), sentence.start + match.end()
                why = (
                    f"{match.group().strip(' ,')!r} has no fixed meaning; give a number or a list."
                )
                yield Finding("vague-amount", start, end, why, rewrite)


def _begins_with_answer(sentence: Sentence) -> bool:
    return sentence.words[0] in words.ANSWERS


def double_negation(text: str, parts: list[Sentence], task: TaskWords) -> Iterator[Finding]:
    """Two negative words in one clause."""
    first = r"\b(?:do not|don['’]t|does not|doesn['’]t|not|never|avoid|no)\b"
    second = "|".join(sorted(words.OPPOSITES, key=len, reverse=True))
    pattern = re.compile(rf"{first}((?:\s+[\w'’]+){{0,4}}?)\s+({second})\b", re.IGNORECASE)
    for match in pattern.finditer(text):
        between, negative = match.group(1), match.group(2).lower()
        if negative in {"no", "nothing", "none"} and not between.strip():
            continue  # "or not: no reason"
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
        if positive or any(_begins_with_answer(near) for near in beside):
            continue
        clause = re.search(r"[^,;.!?]*", sentence.text[match.start() :])
        assert clause is not None
        start = sentence.start + match.start()
        why = "says what not to do, but not what to do instead."
        rewrite = "answer only what is asked" if match.start() else "Answer only what is asked"
        yield Finding(
            "negative-only", start, start + clause.end(), f"{clause.group()!r} {why}", rewrite
        )


def names_the_unwanted(text: str, parts: list[Sentence], task: TaskWords) -> Iterator[Finding]:
    """Instructions that name the thing to avoid, which makes it more likely."""
    for match in words.UNWANTED.finditer(text):
        thing = match.group().strip(" ,")
        why = f"{thing!r} names what the answer must not contain; the model reads these words, too."
        yield Finding("names-the-unwanted", match.start(), match.end(), why, "")


def _conditional(sentence: str, place: int) -> bool:
    """Whether a negation belongs to a condition or a quoted answer, such as "I don't know"."""
    before = sentence[:place]
    return bool(
        re.search(r"\b(?:if|when|unless|whether|that|who|which|I|you)\b[^,]*$", before)
    ) or (before.count('"') % 2 == 1 or before.count("'") % 2 == 1)


def buried_constraint(text: str, parts: list[Sentence], task: TaskWords) -> Iterator[Finding]:
    """A constraint in the middle of a text, where models overlook it most often."""

    def constrains(sentence: Sentence) -> bool:
        return bool(words.CONSTRAINT.search(sentence.text)) or _begins_with_answer(sentence)

    if len(parts) < MIDDLE or constrains(parts[-1]):
        return
    for sentence in parts[1:-1]:
        if constrains(sentence):
            rest = text[sentence.end : parts[-1].end].strip()
            why = "is a constraint in the middle of the text; put it at the end."
            rewrite = f"{rest} {sentence.text}"
            yield Finding(
                "buried-constraint",
                sentence.start,
                parts[-1].end,
                f"{sentence.text!r} {why}",
                rewrite,
            )


def contradiction(text: str, parts: list[Sentence], task: TaskWords) -> Iterator[Finding]:
    """Demands that exclude each other."""
    for first, second in words.OPPOSED:
        one, other = first.search(text), second.search(text)
        if one is None or other is None or _negated(text, one) or _negated(text, other):
            continue
        later = max(one, other, key=lambda match: match.start())
        why = f"{one.group()!r} and {other.group()!r} exclude each other."
        start, end = _phrase_around(text, later)
        yield Finding("contradiction", start, end, why, "")
    most, least = (
        re.search(rf"\b{name} (\d+)", text, re.IGNORECASE) for name in ("at most", "at least")
    )
    if most and least and int(most.group(1)) < int(least.group(1)):
        why = f"{most.group()!r} and {least.group()!r} exclude each other."
        yield Finding("contradiction", least.start(), least.end(), why, most.group())


def _negated(text: str, match: re.Match[str]) -> bool:
    return bool(
        re.search(
            r"(?:\b(?:not|never|no|without|avoid)|n['’]t)\s+(?:\w+\s+)?$",
            text[: match.start()],
            re.I,
        )
    )


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


def undefined_term(text: str, parts: list[Sentence], task: TaskWords) -> Iterator[Finding]:
    """Abbreviations without a definition, and fashionable words with a plain one."""
    known = {word for choice in task.choices for word in WORD.findall(choice)}
    seen = set()
    for match in _ABBREVIATION.finditer(text):
        term = match.group()
        plain = term.removesuffix("s")
        if term in seen or term in known or {term, plain} & words.KNOWN or _spoken(term, text):
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


def _spoken(term: str, text: str) -> bool:
    """Whether capitals are emphasis: all words have them, or the text also has the word small."""
    lower = term.lower()
    emphasis = term.isupper() and (lower in _STOP_WORDS or lower in words.REQUESTS | words.ANSWERS)
    return emphasis or text.isupper() or bool(re.search(rf"\b{lower}\b", text))


def no_output_format(text: str, parts: list[Sentence], task: TaskWords) -> Iterator[Finding]:
    """Choices exist, but nothing says how to answer."""
    complete = f"{text} {task.template}"
    if not task.choices or words.FORMAT.search(complete) or not _missing(complete, task.choices):
        return
    why = "does not say how to answer, though the task has choices."
    yield Finding("no-output-format", len(text), len(text), f"The text {why}", _demand(text, task))


def class_names(text: str, parts: list[Sentence], task: TaskWords) -> Iterator[Finding]:
    """Class names that are missing, or spelled in another way than the task spells them."""
    if not task.choices or len(task.choices) > MOST_CHOICES:
        return
    complete = f"{text} {task.template}"
    for choice in task.choices:
        exact = re.search(rf"(?<!\w){re.escape(choice)}(?!\w)", complete)
        other = re.search(rf"(?<!\w){re.escape(choice)}(?!\w)", text, re.IGNORECASE)
        if exact is None and other is not None:
            why = f"{other.group()!r}: the task spells this class {choice!r}."
            yield Finding("class-names", other.start(), other.end(), why, choice)
    missing = _missing(complete, task.choices)
    if missing:
        names = ", ".join(missing)
        why = f"Class names are missing: {names}."
        yield Finding("class-names", len(text), len(text), why, _demand(text, task))


def _missing(text: str, choices: Sequence[str]) -> list[str]:
    return [
        c for c in choices if not re.search(rf"(?<!\w){re.escape(c)}(?!\w)", text, re.IGNORECASE)
    ]


def _demand(text: str, task: TaskWords) -> str:
    start = "" if text[-1:] in {" ", "\n"} else " "
    if len(task.choices) > MOST_CHOICES:
        return f"{start}Answer with the name of the class only."
    return f"{start}Answer with one of: {', '.join(task.choices)}."


def longer_than_prompt(text: str, parts: list[Sentence], task: TaskWords) -> Iterator[Finding]:
    """More tokens than the prompt that starts from the instruction can hold."""
    if task.token_ends is None or task.num_virtual_tokens is None:
        return
    ends = task.token_ends(text)
    length = task.num_virtual_tokens
    if len(ends) > length:
        why = (
            f"{len(ends)} tokens, but the prompt has num_virtual_tokens: {length}; it starts from "
            f"the first {length} only."
        )
        yield Finding("longer-than-prompt", ends[length - 1], len(text), why, "")


Rule = Callable[[str, list[Sentence], TaskWords], Iterator[Finding]]

#: The rules by name.
RULES: dict[str, Rule] = {
    "too-long": too_long,
    "split-requests": split_requests,
    "filler": filler,
    "vague-amount": vague_amount,
    "double-negation": double_negation,
    "negative-only": negative_only,
    "names-the-unwanted": names_the_unwanted,
    "buried-constraint": buried_constraint,
    "contradiction": contradiction,
    "undefined-term": undefined_term,
    "no-output-format": no_output_format,
    "class-names": class_names,
    "longer-than-prompt": longer_than_prompt,
}
