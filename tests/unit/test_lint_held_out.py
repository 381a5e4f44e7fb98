"""Rules of ``promptshard lint`` on instructions that were written without looking at the rules.

On the first run, all 10 bad ones raised the expected rule, and 4 of the 10 good ones raised a false
alarm. The rules were then corrected; one false alarm is left.
"""

from __future__ import annotations

import pytest

from trainer.evaluation.lint.finding import TaskWords
from trainer.evaluation.lint.rules import lint

#: Instruction -> class names.
GOOD: dict[str, tuple[str, ...]] = {
    "Classify the news headline as world, sports, business or technology. Answer with one word.": (
        "world",
        "sports",
        "business",
        "technology",
    ),
    "Translate the English sentence into German. Write only the translation.": (),
    "Is the claim supported by the paragraph? Answer yes or no.": ("yes", "no"),
    "Extract the invoice number and the due date. Write both as JSON with the keys number and "
    "due_date.": (),
    "Read the support ticket and name the product it is about: router, phone or television.": (
        "router",
        "phone",
        "television",
    ),
    "Write a SQL query that answers the question. Use only the tables listed in the schema.": (),
    "Correct the spelling of the sentence. Keep the words and their order unchanged.": (),
    "Rate the review from 1 to 5, where 1 means very unhappy and 5 means very happy. Answer with "
    "the number.": ("1", "2", "3", "4", "5"),
    "Which side effect does the patient report? Answer with one of: nausea, headache, rash, "
    "none.": ("nausea", "headache", "rash", "none"),
}
#: The second sentence says what the summary contains; the rule takes it for a second request.
FALSE_ALARM = (
    "Summarize the article in at most three sentences. Name the people and the places that it "
    "mentions."
)
#: Instruction -> expected rule, class names.
BAD: dict[str, tuple[str, tuple[str, ...]]] = {
    "Please kindly tell me, if you could, whether the headline is maybe about sports or something "
    "like that.": ("filler", ()),
    "Classify the review. Also translate it into French, and then summarize it and guess the age "
    "of the author.": ("split-requests", ()),
    "Describe the animal in the picture. Don't use long words.": ("negative-only", ()),
    "Answer with one word. Explain your reasoning in detail.": ("contradiction", ()),
    "Determine the sentiment of the text.": ("class-names", ("positive", "negative")),
    "Code the ADR at the PT level and report the SOC.": ("undefined-term", ()),
    "Say whether it is not impossible that the claim is wrong.": ("double-negation", ()),
    "The following text was written by a customer who bought a product in our online shop and who "
    "then decided to write down what he or she thinks about it, and your job is to find out, based "
    "on everything that was written there, which of our departments has to take care of the "
    "problem that the customer has. Answer in English only. The departments are shipping, billing "
    "and repair, and each of them has its own staff, which works from Monday to Friday in the head "
    "office.": ("too-long", ("shipping", "billing", "repair")),
    "Write several things about the product, with a few details etc.": ("vague-amount", ()),
    "Describe the zoo. Never mention lions.": ("names-the-unwanted", ()),
}


@pytest.mark.parametrize("text", GOOD)
def test_good_instructions(text: str) -> None:
    assert lint(text, TaskWords(GOOD[text])) == []


def test_a_known_false_alarm() -> None:
    assert {finding.rule for finding in lint(FALSE_ALARM)} == {"split-requests"}


@pytest.mark.parametrize("text", BAD)
def test_bad_instructions(text: str) -> None:
    rule, choices = BAD[text]
    assert rule in {finding.rule for finding in lint(text, TaskWords(choices))}
