"""The dialogue of ``promptshard chat``: commands, history, and what the ranks are asked."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from launch.chat_session import ChatSession
from tests.unit.saved_run import save_run
from trainer.commands.chat.messages import Question, Reply
from trainer.inference.saved_run import SavedRun, open_run


class Lines:
    """A terminal that reads these lines; an exception among them is raised."""

    is_interactive = False

    def __init__(self, *lines: str | type[BaseException]) -> None:
        self._lines = iter(lines)
        self.notes: list[str] = []
        self.shown: list[dict[str, str]] = []

    def read(self, prompt: str) -> str | None:
        line = next(self._lines, None)
        if isinstance(line, type):
            raise line
        return line

    def note(self, text: str) -> None:
        self.notes.append(text)

    @contextmanager
    def answers(self, names: Sequence[str]) -> Iterator[Any]:
        self.shown.append(dict.fromkeys(names, ""))
        yield self

    def add(self, name: str, text: str) -> None:
        self.shown[-1][name] += text


class Echo:
    """Ranks that answer with the prompt's name and the number of turns."""

    def __init__(self, *replies: Callable[[Question], list[Any]]) -> None:
        self.asked: list[Question] = []
        self._replies: list[Any] = [Reply(0, has_chat_template=True)]
        self._make = replies[0] if replies else self._echo

    @staticmethod
    def _echo(question: Question) -> list[Reply]:
        number, text = question.number, f"{question.prompt} {len(question.dialogue)}"
        return [Reply(number, " "), Reply(number, text), Reply(number, finish="stop")]

    def ask(self, question: Question) -> None:
        self.asked.append(question)
        self._replies += self._make(question)

    def reply(self) -> Reply | None:
        reply = self._replies.pop(0)
        if isinstance(reply, type):
            raise reply
        return reply


@pytest.fixture
def run(tmp_path: Path) -> SavedRun:
    return open_run(save_run(tmp_path / "run"))


def chat(run: SavedRun, engine: Echo, *lines: str | type[BaseException]) -> tuple[int, Lines]:
    terminal = Lines(*lines)
    session = ChatSession(run, engine, terminal, "short", 9)  # type: ignore[arg-type]
    assert session.has_started()
    return session.run(), terminal


def contents(question: Question) -> list[str]:
    return [turn["content"] for turn in question.dialogue]


def test_the_dialogue_is_asked_with_its_history(run: SavedRun) -> None:
    engine = Echo()
    code, terminal = chat(run, engine, "/template chat", "/system Be brief.", "One", "Two")
    assert code == 0
    assert contents(engine.asked[0]) == ["Be brief.", "One"]
    assert contents(engine.asked[1]) == ["Be brief.", "One", "short 2", "Two"]
    assert [turn["role"] for turn in engine.asked[1].dialogue] == [
        *("system", "user", "assistant", "user")
    ]
    assert terminal.shown == [{"short": "short 2"}, {"short": "short 4"}]


def test_a_prompt_reads_the_template_that_it_was_trained_with(run: SavedRun) -> None:
    engine = Echo()
    _, terminal = chat(run, engine, "One", "/none", "Two", "/template task", "Three")
    assert [question.chat_template for question in engine.asked] == [False, True, False]
    assert "each message alone, in the template of task 'triage'" in terminal.notes[0]


def test_two_prompts_answer_side_by_side(run: SavedRun) -> None:
    engine = Echo()
    _, terminal = chat(run, engine, "One", "/compare long none", "Two", "Three", "/use words", "4")
    assert terminal.shown[1] == {"long": "long 3", "none": "None 3"}
    assert contents(engine.asked[3])[-2:] == ["long 3", "Three"], "each has its own answers"
    assert contents(engine.asked[4])[-2:] == ["None 3", "Three"]
    assert contents(engine.asked[5])[-2:] == ["long 5", "4"]


def test_ctrl_c_stops_the_answer_and_not_the_chat(run: SavedRun) -> None:
    def stopped(question: Question) -> list[Any]:
        number = question.number
        if question.cancel:
            return [Reply(number, finish="cancelled")]
        return [Reply(number, "a beginning"), KeyboardInterrupt]

    engine = Echo(stopped)
    code, terminal = chat(run, engine, KeyboardInterrupt, "/template chat", "One", "Two")
    assert code == 0
    assert terminal.notes.count("stopped") == 2
    assert contents(engine.asked[-2]) == ["One", "a beginning", "Two"]


def test_turns_that_are_left_out_are_reported(run: SavedRun) -> None:
    def dropping(question: Question) -> list[Any]:
        return [Reply(question.number, dropped=2), Reply(question.number, "a", finish="length")]

    _, terminal = chat(run, Echo(dropping), "One")
    assert any("no room for the 2 oldest turns" in note for note in terminal.notes)
    assert any("--max-new-tokens" in note for note in terminal.notes)


def test_a_question_without_an_answer_is_forgotten(run: SavedRun) -> None:
    def refused(question: Question) -> list[Any]:
        if question.number == 1:
            return [Reply(1, error="has 900 tokens")]
        return [Reply(question.number, "yes", finish="stop")]

    engine = Echo(refused)
    _, terminal = chat(run, engine, "One", "Two")
    assert "error: has 900 tokens" in terminal.notes
    assert contents(engine.asked[1]) == ["Two"]


def test_a_chat_whose_ranks_end_fails(run: SavedRun) -> None:
    code, _ = chat(run, Echo(lambda question: [None]), "One", "Two")
    assert code == 1


def test_a_chat_whose_ranks_fail_during_an_answer_fails(run: SavedRun) -> None:
    failed = Echo(lambda q: [Reply(q.number, "Che"), Reply(q.number, finish="failed")])
    code, _ = chat(run, failed, "hello")
    assert code == 1


def test_a_dialogue_is_saved_as_a_row(run: SavedRun, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    _, terminal = chat(run, Echo(), "One", f"/save {path}", f"/save {tmp_path}", "/clear")
    assert json.loads(path.read_text()) == {
        "prompt": "short",
        "messages": [
            {"role": "user", "content": "One"},
            {"role": "assistant", "content": "short 1"},
        ],
    }
    assert any("/save: cannot write" in note for note in terminal.notes)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("/use shrt", "has no prompt 'shrt' (did you mean 'short'?)"),
        ("/use", "/use: needs a name; known: short, long, words"),
        ("/usee", "is not a command (did you mean '/use'?)"),
        ("/compare short", "needs two names"),
        ("/compare short short", "needs two different names"),
        ("/template words", "is neither chat nor task"),
        ("/save", "needs the name of a file"),
    ],
)
def test_mistakes_are_explained(run: SavedRun, line: str, problem: str) -> None:
    engine = Echo()
    code, terminal = chat(run, engine, line, "/quit", "not asked")
    assert code == 0
    assert engine.asked == []
    assert any(problem in note for note in terminal.notes), terminal.notes
