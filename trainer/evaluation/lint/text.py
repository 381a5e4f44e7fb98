"""Sentences and words of an instruction, with their places in the text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
#: A full stop after one of these does not end a sentence.
_ABBREVIATIONS = ("e.g", "i.e", "etc", "vs", "cf", "dr", "mr", "mrs", "no", "approx")
_END = re.compile(r"[.!?]+(?=[\s\"')\]]|$)|\n+")


@dataclass(frozen=True)
class Sentence:
    """A sentence of an instruction.

    Attributes:
        start: index of its first character in the instruction.
        text: the sentence with its end mark, without white space around it.
    """

    start: int
    text: str

    @property
    def end(self) -> int:
        return self.start + len(self.text)

    @property
    def words(self) -> list[str]:
        """Return the words in lower case, with straight apostrophes."""
        return [match.group().lower().replace("’", "'") for match in WORD.finditer(self.text)]


def sentences(text: str) -> list[Sentence]:
    """Split an instruction at end marks and line breaks; parts without a word are left out."""
    return list(_sentences(text))


def _sentences(text: str) -> Iterator[Sentence]:
    start = 0
    for match in [*_END.finditer(text), None]:
        end = len(text) if match is None else match.end()
        if match is not None and match.group() == "." and _abbreviated(text[start : match.start()]):
            continue
        part = text[start:end]
        if WORD.search(part):
            yield Sentence(start + len(part) - len(part.lstrip()), part.strip())
        start = end


def _abbreviated(before: str) -> bool:
    return before.lower().endswith(_ABBREVIATIONS) and not before[-3:].isupper()


def is_label(sentence: Sentence) -> bool:
    """Whether a part is the label of the text that follows, such as "Review:"."""
    return sentence.text[-1] not in ".!?" and len(sentence.words) <= 3


def quotations(text: str) -> Iterator[tuple[int, int]]:
    """Yield the places of quoted texts, which are not the words of the instruction."""
    for match in re.finditer(r'"[^"\n]+"|“[^”\n]+”|`[^`\n]+`|(?<!\w)\'[^\'\n]+\'(?!\w)', text):
        yield match.span()


def tidy(text: str) -> str:
    """Remove double spaces and spaces before punctuation; begin with a capital letter."""
    text = re.sub(r"[ \t]{2,}", " ", text)
    text = re.sub(r"\s+([.,;:!?])", r"\1", text)
    text = re.sub(r",([.!?])", r"\1", text)
    text = re.sub(r"^[\s.,;:]+", "", text)
    return text[:1].upper() + text[1:]
