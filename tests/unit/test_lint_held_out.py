"""Rules of ``promptshard lint`` on instructions written before any rule was run on them.

``held_out_instructions.jsonl`` has three sets of 10 good and 10 bad instructions; a bad one names
the rule that it breaks. On the first run:

| set | false alarms | misses | then |
|---|---|---|---|
| 1 | 4 | 0 | rules corrected; one false alarm is left |
| 2 | 1 | 4 | rules corrected; none is left |
| 3, after that | 0 | 1 | the miss is left |
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.evaluation.lint.finding import TaskWords
from trainer.evaluation.lint.rules import lint

FILE = Path(__file__).parent / "data" / "held_out_instructions.jsonl"
INSTRUCTIONS = [json.loads(line) for line in FILE.read_text().splitlines()]
GOOD = [each for each in INSTRUCTIONS if "rule" not in each]
BAD = [each for each in INSTRUCTIONS if "rule" in each]
#: The second sentence says what the summary contains; the rule takes it for a second request.
FALSE_ALARM = "Summarize the article in at most three sentences. Name the people and the places"
#: A purpose rather than a demand; nothing says how the text is to sound instead.
MISSED = "Rewrite the product text so it doesn't sound cheap."


def rules_of(instruction: dict[str, Any]) -> set[str]:
    task = TaskWords(tuple(instruction.get("choices", ())))
    return {finding.rule for finding in lint(instruction["text"], task)}


def text_of(instruction: dict[str, Any]) -> str:
    return str(instruction["text"])


@pytest.mark.parametrize("instruction", GOOD, ids=text_of)
def test_good_instructions(instruction: dict[str, Any]) -> None:
    expected = {"split-requests"} if instruction["text"].startswith(FALSE_ALARM) else set()
    assert rules_of(instruction) == expected


@pytest.mark.parametrize("instruction", BAD, ids=text_of)
def test_bad_instructions(instruction: dict[str, Any]) -> None:
    found = instruction["rule"] in rules_of(instruction)
    assert found == (instruction["text"] != MISSED)


def test_every_set_has_ten_good_and_ten_bad_ones() -> None:
    for number in (1, 2, 3):
        assert sum(each["set"] == number for each in GOOD) == 10
        assert sum(each["set"] == number for each in BAD) == 10
