"""The instructions in words of a run file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from trainer.config import PLACEHOLDER, RunConfig, Task
from trainer.evaluation.lint.finding import TaskWords
from trainer.model.tokenizer_file import token_ends


@dataclass(frozen=True)
class Instruction:
    """An instruction in words and its place in the run file.

    Attributes:
        place: name of the setting, for messages.
        task: the task that the instruction is for; None: any.
        words: what the rules need to know of that task.
    """

    place: str
    text: str
    task: str | None
    words: TaskWords

    @property
    def is_system(self) -> bool:
        """Whether the text is that of the system, not one before the input."""
        return self.place.endswith(".system")


def instructions_of(config: RunConfig, task: str | None = None) -> list[Instruction]:
    """Return the hand-written prompts, system texts and initial texts of a run file.

    A text is listed once per task, at its first place.

    Args:
        task: only the instructions of this task.
    """
    texts = _Texts(config)
    instructions: dict[tuple[str, str], Instruction] = {}
    for each in texts.all():
        if task in (None, each.task):
            instructions.setdefault((str(each.task), each.text.strip()), each)
    return list(instructions.values())


def instruction_for(config: RunConfig, task: Task, text: str) -> Instruction:
    """Return a text that a prompt of a task might start from; its place is ``--text``."""
    lengths = [p.num_virtual_tokens for p in config.prompts if p.task == task.name and p.init.text]
    return _Texts(config).of(task, "--text", text, [*lengths, *_searched(config, task)])


class _Texts:
    """The texts of a run file, with what the rules need to know of their tasks."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._tokenize = token_ends(config.base)

    def of(self, task: Task, place: str, text: str, lengths: Sequence[int] = ()) -> Instruction:
        """Describe a text; ``lengths`` are those of the prompts that may start from it."""
        template = "" if task.messages else PLACEHOLDER.sub(" ", task.input)
        longest = max(lengths, default=None)
        words = TaskWords(task.choices or (), template, longest, self._tokenize)
        return Instruction(place, text, task.name, words)

    def all(self) -> Iterator[Instruction]:
        for i, task in enumerate(self._config.tasks):
            lengths = _searched(self._config, task)
            for j, text in enumerate(task.hand_written):
                yield self.of(task, f"tasks.{i}.hand_written.{j}", text, lengths)
            if task.system:
                yield self.of(task, f"tasks.{i}.system", task.system)
        for i, prompt in enumerate(self._config.prompts):
            start = prompt.init.text
            if start:
                task, lengths = self._config.task(prompt.task), [prompt.num_virtual_tokens]
                yield self.of(task, f"prompts.{i}.init.text", start, lengths)


def _searched(config: RunConfig, task: Task) -> list[int]:
    """Lengths of the prompts whose search for a start also tries the hand-written prompts."""
    return [p.num_virtual_tokens for p in config.prompts if p.task == task.name and p.init.open]
