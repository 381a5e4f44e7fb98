"""The dialogue of a chat: commands, history, and questions to the ranks."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Protocol

from launch.chat_terminal import ChatTerminal
from trainer.commands.chat.messages import Question, Reply
from trainer.config import PLACEHOLDER, Task
from trainer.inference.saved_run import SavedRun
from trainer.runtime.errors import EXIT_DONE, EXIT_FAILURE, BadInput, did_you_mean

HELP = """\
/use NAME           answer with this prompt
/none               answer with the base alone
/compare A B        answer with two prompts side by side; none: the base alone
/system TEXT        text of the system before the dialogue; without TEXT: remove it
/template chat      the base's chat template writes the dialogue so far
/template task      each message alone, in the template that the prompt was trained with
/clear              forget the dialogue
/save FILE          append the dialogue to FILE, as a line of JSON
/quit               end (also Ctrl-D); Ctrl-C stops an answer"""
#: Name of the base alone.
NONE = "none"
#: Values of /template.
CHAT, TASK = "chat", "task"
SYSTEM = {"role": "system"}


class Engine(Protocol):
    """What answers; see ``chat_process.ChatEngine``."""

    def ask(self, question: Question) -> None: ...
    def reply(self) -> Reply | None: ...


@dataclass
class Lane:
    """One of the answering prompts, with its dialogue.

    Attributes:
        prompt: name; None: the base alone.
        turns: without that of the system.
    """

    prompt: str | None
    turns: list[dict[str, str]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.prompt or NONE


class ChatSession:
    """Reads lines until the end of the input or ``/quit``.

    Args:
        prompt: name of the prompt to begin with.
    """

    COMMANDS: ClassVar[tuple[str, ...]] = (
        *("use", "none", "compare", "system", "template", "clear", "save", "help", "quit"),
    )

    def __init__(
        self,
        run: SavedRun,
        engine: Engine,
        terminal: ChatTerminal,
        prompt: str,
        max_new_tokens: int,
    ) -> None:
        self._run, self._engine, self._terminal = run, engine, terminal
        self._lanes = [Lane(prompt)]
        self._system_text: str | None = None
        self._template: str | None = None
        self._has_chat_template = False
        self._most = max_new_tokens
        self._numbers = itertools.count(1)
        self._failed = False

    def has_started(self) -> bool:
        """Wait until the base is loaded; False if the ranks ended before."""
        reply = self._engine.reply()
        if reply is not None:
            self._has_chat_template = reply.has_chat_template
        return reply is not None

    def run(self) -> int:
        """Answer every line; return the exit code."""
        self._describe()
        if self._terminal.is_interactive:
            self._terminal.note("/help lists the commands")
        while not self._failed:
            try:
                line = self._terminal.read("|".join(lane.name for lane in self._lanes))
            except KeyboardInterrupt:
                self._terminal.note("/quit ends the chat")
                continue
            if line is None or line.strip() == "/quit":
                return EXIT_DONE
            try:
                self._respond(line.strip())
            except BadInput as error:
                for problem in error.problems:
                    self._terminal.note(f"error: {problem}")
        return EXIT_FAILURE

    def _respond(self, line: str) -> None:
        """Run a command, or answer a message; raises ``BadInput``."""
        if not line.startswith("/"):
            if line:
                self._ask(line)
            return
        word, _, rest = line[1:].partition(" ")
        if word not in self.COMMANDS:
            known = [f"/{name}" for name in self.COMMANDS]
            hint = did_you_mean(f"/{word}", known)
            raise BadInput(f"/{word}: is not a command{hint}; known: {', '.join(known)}")
        command: Callable[[str], None] = getattr(self, f"_command_{word}")
        command(rest.strip())

    def _command_use(self, name: str) -> None:
        self._lanes = [Lane(self._known(name), self._lanes[0].turns)]
        self._describe()

    def _command_none(self, _: str) -> None:
        self._command_use(NONE)

    def _command_compare(self, names: str) -> None:
        if len(names.split()) != 2:
            raise BadInput("/compare: needs two names: /compare A B; none: the base alone")
        chosen = [self._known(name) for name in names.split()]
        if chosen[0] == chosen[1]:
            raise BadInput("/compare: needs two different names")
        turns = self._lanes[0].turns
        self._lanes = [Lane(name, [*turns]) for name in chosen]
        self._describe()

    def _command_system(self, text: str) -> None:
        self._system_text = text or None
        self._describe()

    def _command_template(self, name: str) -> None:
        if name not in (CHAT, TASK):
            raise BadInput(f"/template: {name!r} is neither {CHAT} nor {TASK}")
        if name == CHAT and not self._has_chat_template:
            raise BadInput("/template: the base has no chat template; use base.chat_template")
        self._template = name
        self._describe()

    def _command_clear(self, _: str) -> None:
        for lane in self._lanes:
            lane.turns.clear()
        self._terminal.note("the dialogue is empty")

    def _command_save(self, name: str) -> None:
        if not name:
            raise BadInput("/save: needs the name of a file")
        path = Path(name).expanduser()
        try:
            with path.open("a", encoding="utf-8") as file:
                for lane in self._lanes:
                    row = {"prompt": lane.prompt, "messages": self._dialogue(lane)}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
        except OSError as error:
            raise BadInput(f"/save: cannot write {path}: {error.strerror}") from None
        self._terminal.note(f"saved {sum(len(lane.turns) for lane in self._lanes)} turns to {path}")

    def _command_help(self, _: str) -> None:
        self._terminal.note(HELP)

    def _known(self, name: str) -> str | None:
        """Return the name of a prompt, None for ``none``; raises ``BadInput`` for others."""
        if not name:
            raise BadInput(f"/use: needs a name; known: {', '.join(self._run.prompts)}")
        if name == NONE and NONE not in self._run.prompts:
            return None
        return self._run.prompts[name].name

    def _uses_chat(self, lane: Lane) -> bool:
        """Whether the base's chat template writes the dialogue of a prompt."""
        if self._template is not None:
            return self._template == CHAT
        return self._has_chat_template and (lane.prompt is None or _is_dialogue(self._task(lane)))

    def _describe(self) -> None:
        """Show who answers, and what it reads."""
        for lane in self._lanes:
            who = "the base alone" if lane.prompt is None else f"prompt {lane.prompt!r}"
            if self._uses_chat(lane):
                reads = "reads the dialogue so far, in the chat template"
                if self._system_text is not None:
                    reads += f", after the text of the system {self._system_text!r}"
            else:
                task = self._task(lane)
                reads = f"reads each message alone, in the template of task {task.name!r}"
                if self._has_chat_template:
                    reads += " (/template chat: the dialogue)"
            self._terminal.note(f"{who} {reads}")

    def _task(self, lane: Lane) -> Task:
        config = self._run.config
        return config.tasks[0] if lane.prompt is None else self._run.prompts[lane.prompt].task

    def _dialogue(self, lane: Lane) -> list[dict[str, str]]:
        system = [] if self._system_text is None else [SYSTEM | {"content": self._system_text}]
        return [*system, *lane.turns]

    def _ask(self, text: str) -> None:
        """Send a message to all prompts, show their answers, and add these to the dialogue."""
        asked = {next(self._numbers): lane for lane in self._lanes}
        for number, lane in asked.items():
            lane.turns.append({"role": "user", "content": text})
            self._engine.ask(
                Question(
                    number,
                    lane.prompt,
                    self._dialogue(lane),
                    chat_template=self._uses_chat(lane),
                    max_new_tokens=self._most,
                )
            )
        answers = self._show(asked)
        for number, lane in asked.items():
            if not answers.get(number):
                lane.turns.pop()  # the question has no answer
            else:
                lane.turns.append({"role": "assistant", "content": answers[number].rstrip()})

    def _show(self, asked: Mapping[int, Lane]) -> dict[int, str]:
        """Show answers while they come; return those that have no error."""
        answers = dict.fromkeys(asked, "")
        running, problems = set(asked), []
        with self._terminal.answers([lane.name for lane in asked.values()]) as view:
            while running and not self._failed:
                try:
                    reply = self._engine.reply()
                except KeyboardInterrupt:
                    for number in running:
                        self._engine.ask(Question(number, cancel=True))
                    continue
                if reply is None:
                    self._failed = True
                elif reply.number in running:
                    if reply.dropped:
                        problems.append(
                            f"the context has no room for the {reply.dropped} oldest turns; they "
                            "are left out (/clear forgets all)"
                        )
                    if reply.error is not None:
                        problems.append(f"error: {reply.error}")
                        del answers[reply.number]
                    text = reply.text if answers.get(reply.number) else reply.text.lstrip()
                    if text:
                        view.add(asked[reply.number].name, text)
                        answers[reply.number] += text
                    if reply.error is not None or reply.finish is not None:
                        running.discard(reply.number)
                    if reply.finish == "failed":
                        self._failed = True
                    if reply.finish == "cancelled":
                        problems.append("stopped")
                    if reply.finish == "length":
                        problems.append("ended at the limit of tokens (--max-new-tokens)")
        for problem in dict.fromkeys(problems):
            self._terminal.note(problem)
        return answers


def _is_dialogue(task: Task) -> bool:
    """Whether the rows of a task are dialogues, or messages without other text around them."""
    return task.is_chat and not PLACEHOLDER.sub("", task.input).strip()
