"""Rules of ``promptshard lint`` on good and bad instructions, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from launch.commands import app
from trainer.evaluation.lint.finding import TaskWords
from trainer.evaluation.lint.rewrites import apply_all
from trainer.evaluation.lint.rules import RULES, lint
from trainer.evaluation.lint.text import sentences

SENTIMENT = TaskWords(("positive", "negative", "neutral"))

#: The same demand of a pharmaceutical company, badly and well put.
PHARMACY_BAD = (
    "Please could you generate some information about various metabolic diseases such as T2DM, "
    "obesity, etc., and also list the drugs and compare their prices, but don't mention anything "
    "about cancer or our competitors, and make sure it is brief while giving a comprehensive and "
    "detailed overview that is not without examples."
)
PHARMACY_GOOD = (
    "Describe drugs that treat type 2 diabetes or obesity: for each, give its name, how it works, "
    "and its two most frequent side effects. Use one line per drug."
)

BAD = {
    "Do not forget to answer. What is the review about?": {"double-negation"},
    "Is it good? What drug is it?": {"split-requests"},
    "Don't use long words.": {"negative-only"},
    "Read the text. Answer with exactly one word. The text is a review. It was written by a "
    "patient. The patient took a drug.": {"buried-constraint"},
    "Write at most 20 words. Use at least 50 words.": {"contradiction"},
    "Describe the drug in plain language with technical terms.": {"contradiction"},
    "I would like you to leverage the KPI to describe sales.": {"filler", "undefined-term"},
    "Summarize the article, translate it to French and write a poem.": {"split-requests"},
    "Do not include irrelevant details.": {
        "double-negation",
        "names-the-unwanted",
        "negative-only",
    },
    "List several side effects, and so on.": {"vague-amount"},
    "Answer in one word and explain your reasons.": {"contradiction"},
    " ".join(f"word{i}" for i in range(40)) + ".": {"too-long"},
    "The cat sat on the mat. " * 8: {"too-long"},
}
GOOD = [
    PHARMACY_GOOD,
    'Answer the question using only the context. If the answer is not in the context, say "I '
    "don't know\".",
    "Translate the sentence to German. Keep the names unchanged.",
    "Extract all drug names from the text. Return a JSON list of strings.",
    "Summarize the article in three sentences for a reader who knows nothing about the subject.",
    "Write a Python function that returns the sum of a list. Do not use loops; use sum().",
    "Identify the language of the text. Reply with its ISO code, such as en or fr.",
    "What is this message about? ",
    "Rate the essay from 1 to 5. Answer with the number only.",
    "Rewrite the letter in plain language (at most 100 words).",
    "You are a nurse. The text is a call to an emergency line. The caller may be upset. Decide "
    "how urgent the call is. Answer with a number from 1 to 3.",
]
GOOD_WITH_CHOICES = [
    "Classify the review of a drug as positive, negative or neutral.\n\n",
    "Is the patient satisfied with the drug? Answer positive, negative or neutral.\n\n",
    "Decide whether the review is positive, negative or neutral. Respond with the label only.",
]


def rules_of(text: str, task: TaskWords | None = None) -> set[str]:
    return {finding.rule for finding in lint(text, task)}


@pytest.mark.parametrize("text", BAD)
def test_bad_instruction(text: str) -> None:
    assert rules_of(text) == BAD[text]


@pytest.mark.parametrize("text", GOOD)
def test_good_instruction(text: str) -> None:
    assert lint(text) == []


@pytest.mark.parametrize("text", GOOD_WITH_CHOICES)
def test_good_instruction_for_choices(text: str) -> None:
    assert lint(text, SENTIMENT) == []


def test_pharmacy() -> None:
    assert len(rules_of(PHARMACY_BAD)) >= 4
    assert lint(PHARMACY_GOOD) == []


def test_every_rule_is_tested() -> None:
    found = {rule for rules in BAD.values() for rule in rules}
    with_task = {"no-output-format", "class-names", "longer-than-prompt"}
    assert found | with_task == set(RULES)


class TestFalseAlarms:
    """Wording that looks like a mistake and is none."""

    @pytest.mark.parametrize(
        "text",
        [
            "How would you rate this review?",
            "What title would you choose for the text?",
            "Answer the question. If you can't find the answer, write unknown.",
            "Write a thank you note to the customer.",
            "Count how many words the sentence has.",
            "Summarize the long text in three sentences.",
            "Is the claim correct? Yes or no?",
            "Find the dates. If there is none, write none.",
            "Find the cities in the text. List them in alphabetical order.",
            "Write the date as YYYY-MM-DD.",
            "Summarize the PubMed abstract in one sentence.",
            "Answer with the Roman numeral, such as IV.",
            "TASK: decide whether the text is CRITICAL or not.",
            "Decide whether the style of the text is formal or informal.",
            "Rewrite the informal letter in a formal style.",
            "Describe the mood of the poem in one word.",
            "Answer no if the claim is incorrect.",
            "Return the JSON object only. Do not include any explanation.",
            "Never make up a fact: if the text has no answer, say unknown.",
            'Begin the reply with "Thank you for some questions, etc."',
            "Below is a text. It is short. What is it about? Answer in one word.\n\nText:",
            "The clinic only treats adults. It is in Bonn. It opens on Monday. Who works there?",
        ],
    )
    def test_without_choices(self, text: str) -> None:
        assert lint(text) == []

    def test_a_class_name_with_a_capital_letter_at_the_start(self) -> None:
        assert lint("Yes or no: is the claim true?", TaskWords(("yes", "no"))) == []

    def test_class_names_are_not_counted_as_words_of_a_sentence(self) -> None:
        names = tuple(f"class number {i}" for i in range(15))
        assert lint(f"Choose one of: {', '.join(names)}.", TaskWords(names)) == []

    def test_class_names_may_be_vague(self) -> None:
        names = ("yes", "no", "maybe some")
        assert lint("Answer yes, no or maybe some reviews.", TaskWords(names)) == []


@pytest.mark.parametrize(
    ("text", "rewritten"),
    [
        ("Rewrite the letter. Do not change the names.", "Keep the names unchanged."),
        ("Rewrite the letter. It must not exceed one page.", "Stay within one page."),
        ("Name the drugs. Don't guess.", "Use only what the text says."),
    ],
)
def test_a_negative_demand_is_rewritten_as_a_positive_one(text: str, rewritten: str) -> None:
    (finding,) = lint(text)
    assert finding.rule == "negative-only"
    assert finding.apply(text).endswith(rewritten)


@pytest.mark.parametrize(
    ("text", "rewritten"),
    [
        ("Name the drug, if possible, with its dose.", "Name the drug with its dose."),
        ("Name fruits, nuts, and so on.", "Name fruits, nuts."),
        ("Name the drug, thanks a lot in advance!", "Name the drug"),
        ("It would be great if you could name the drug.", "Name the drug."),
        ("Could you help me write a poem?", "Write a poem?"),
    ],
)
def test_nothing_is_left_of_a_phrase(text: str, rewritten: str) -> None:
    (finding,) = lint(text)
    assert finding.apply(text) == rewritten


def test_a_sentence_that_is_left_out_leaves_no_end_mark() -> None:
    text = "Name the field of the note. Don't mention the hospital."
    (finding,) = (each for each in lint(text) if each.rule == "names-the-unwanted")
    assert finding.apply(text) == "Name the field of the note."


@pytest.mark.parametrize(
    "text",
    [
        "Carefully read the note and briefly name the field, and list the symptoms.",
        "Name the field, and list several of the symptoms.",
    ],
)
def test_an_adverb_or_an_amount_hides_no_request(text: str) -> None:
    assert "split-requests" in {finding.rule for finding in lint(text)}


def test_a_contradiction_within_one_phrase_is_not_rewritten_to_nothing() -> None:
    (finding,) = lint("Reply in plain text formatted as JSON.")
    assert (finding.rule, finding.measurable) == ("contradiction", False)
    assert finding.rewrite


class TestTask:
    def test_class_names_in_other_letters(self) -> None:
        text = "Classify as Positive, negative or neutral."
        (finding,) = lint(text, SENTIMENT)
        assert (finding.rule, text[finding.start : finding.end]) == ("class-names", "Positive")
        assert finding.apply(text) == "Classify as positive, negative or neutral."

    def test_missing_class_names_and_format(self) -> None:
        findings = lint("Judge the review: positive or negative.", SENTIMENT)
        assert {finding.rule for finding in findings} == {"class-names", "no-output-format"}
        assert "neutral" in findings[0].why

    def test_the_template_may_name_the_classes(self) -> None:
        template = "\nAnswer with positive, negative or neutral:"
        assert lint("Judge the review.", TaskWords(SENTIMENT.choices, template)) == []

    def test_longer_than_the_prompt(self) -> None:
        task = TaskWords((), "", 2, lambda text: [4, 8, 13])
        (finding,) = lint("Some more words", task)
        assert finding.rule == "longer-than-prompt"
        assert finding.apply("Some more words") == "Some mor"


@pytest.mark.parametrize("text", [*BAD, PHARMACY_BAD])
def test_spans_and_rewrites(text: str) -> None:
    """Every finding marks a part of the text, and its rewrite changes the text."""
    findings = lint(text)
    assert findings
    for finding in findings:
        assert 0 <= finding.start <= finding.end <= len(text)
        changed = finding.apply(text)
        assert changed != text
        assert "  " not in changed.strip()


def test_a_rewrite_at_the_start_of_a_sentence_keeps_its_capital_letter() -> None:
    text = "It is a review. Please name the drug. In order to answer, write one word."
    findings = [f for f in lint(text) if f.rule == "filler"]
    assert [finding.apply(text) for finding in findings] == [
        "It is a review. Name the drug. In order to answer, write one word.",
        "It is a review. Please name the drug. To answer, write one word.",
    ]
    both = "It is a review. Name the drug. To answer, write one word."
    assert apply_all(text, findings) == both


def test_a_run_of_spaces_does_not_hang() -> None:
    """A pattern with nested repetition would take exponential time here."""
    text = f"Describe the drug{' ' * 200}here and list the prices."
    assert rules_of(text) == {"split-requests"}


def test_sentences_keep_abbreviations_together() -> None:
    text = "Name drugs, e.g. aspirin. Stop!\nNow"
    assert [s.text for s in sentences(text)] == ["Name drugs, e.g. aspirin.", "Stop!", "Now"]
    assert all(text[s.start : s.end] == s.text for s in sentences(text))


@pytest.mark.parametrize(
    "text", ["", " \n", "?!", "\x1b[31m", "a" * 5000, "Ärger\u202e über 日本語"]
)
def test_odd_texts(text: str) -> None:
    assert isinstance(lint(text, SENTIMENT), list)


class TestCommand:
    def run(self, *arguments: str) -> Any:
        return CliRunner().invoke(app, ["lint", *arguments])

    def test_text(self) -> None:
        result = self.run("--text", PHARMACY_BAD)
        assert result.exit_code == 0
        assert "names-the-unwanted" in result.output
        assert "findings in 1 text" in result.output

    def test_json(self, tmp_path: Path) -> None:
        path = tmp_path / "lint.json"
        result = self.run("examples/quickstart.yaml", "--json", str(path))
        assert result.exit_code == 0
        prompts = json.loads(path.read_text())["prompts"]
        assert len(prompts) == 6
        finding = prompts[0]["findings"][0]
        assert set(finding) >= {"rule", "start", "end", "why", "rewrite", "effect"}

    def test_text_for_the_task_of_a_run(self) -> None:
        text = "Name the diet: plants, meat or insects."
        result = self.run("examples/quickstart.yaml", "--task", "animals", "--text", text)
        assert "no findings" in result.output
        result = self.run("examples/quickstart.yaml", "--text", text)
        assert "metabolic" in result.output

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ([], "nothing to read"),
            (["--text", "  "], "is empty"),
            (["--text", "a b", "--task", "x"], "name the RUN.yaml"),
            (["examples/quickstart.yaml", "--task", "triag"], "no task 'triag'"),
        ],
    )
    def test_bad_input(self, arguments: list[str], message: str) -> None:
        result = self.run(*arguments)
        assert message in str(result.exception)
