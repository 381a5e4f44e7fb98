"""Rules on the length of an instruction, its parts and their order."""

from __future__ import annotations

import re
from collections.abc import Iterator

from trainer.evaluation.lint import words
from trainer.evaluation.lint.finding import Finding, TaskWords, protected
from trainer.evaluation.lint.requests import begins_with_answer, is_question, requests_in
from trainer.evaluation.lint.text import WORD, Sentence, is_label, tidy

#: A sentence of more words is too long.
LONG_SENTENCE = 30
#: Rules about the length of a text look at texts of at least this many words.
LONG_TEXT = 40
#: A long text needs at least this many different content words per word.
LEAST_CONTENT = 0.3
#: A constraint can be in the middle of a text of at least this many sentences.
MIDDLE = 4


def too_long(text: str, parts: list[Sentence], task: TaskWords) -> Iterator[Finding]:
    """Long sentences, and long texts that say little or repeat themselves."""
    spared = protected(text, task)
    for sentence in parts:
        listed = (
            len(WORD.findall(text, start, end))
            for start, end in spared
            if sentence.start <= start and end <= sentence.end
        )
        count = len(sentence.words) - sum(listed)
        if count > LONG_SENTENCE:
            why = f"{count} words in one sentence; a model follows shorter sentences more exactly."
            rewrite = _divided(sentence.text)
            ready = rewrite is not None
            rewrite = rewrite or "(two or three sentences)"
            yield Finding("too-long", sentence.start, sentence.end, why, rewrite, measurable=ready)
    content = [
        word for sentence in parts for word in sentence.words if word not in words.STOP_WORDS
    ]
    count = sum(len(sentence.words) for sentence in parts)
    if count >= LONG_TEXT and len(set(content)) < LEAST_CONTENT * count:
        why = f"{count} words, but only {len(set(content))} different ones with content."
        seen: set[str] = set()
        kept = []
        for sentence in parts:
            new = {word for word in sentence.words if word not in words.STOP_WORDS} - seen
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
    always = [s for s in parts if not words.CASE.match(s.text)]
    requests = [(s, place) for s in always for place in requests_in(s)]
    questions = [(s, 0) for s in always if is_question(s) and s not in dict(requests)]
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


def _clause_start(sentence: str, place: int) -> int:
    """Return the place of the comma or conjunction before a clause."""
    before = re.search(r"(?:[\s,;:]|\b(?:and|then|also|as well as|or)\b)+$", sentence[:place])
    assert before is not None
    return before.start()


def buried_constraint(text: str, parts: list[Sentence], task: TaskWords) -> Iterator[Finding]:
    """A constraint in the middle of a text, where models overlook it most often."""

    def constrains(sentence: Sentence) -> bool:
        if begins_with_answer(sentence):
            return True
        asks = sentence.words[0] in words.REQUESTS or words.DEMAND.search(sentence.text)
        return bool(asks and words.CONSTRAINT.search(sentence.text))

    while parts and is_label(parts[-1]):
        parts = parts[:-1]  # of the input, which follows
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
        start = ends[length - 1]
        # The cut text is a start for training, not an instruction to score.
        yield Finding("longer-than-prompt", start, len(text), why, "", measurable=False)
