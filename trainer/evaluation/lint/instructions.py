"""The instructions in words of a run file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.config import PLACEHOLDER, RunConfig, Task
from trainer.evaluation.lint.rules import TaskWords


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


def instructions_of(config: RunConfig) -> list[Instruction]:
    """Return the hand-written prompts, system texts and initial texts of a run file.

    A text is listed once per task, at its first place.
    """
    tokenize = _tokenizer(config.base.model)
    instructions: dict[tuple[str, str], Instruction] = {}
    for task, place, text in _texts(config):
        words = words_of(config, task, tokenize)
        instructions.setdefault(
            (task.name, text.strip()), Instruction(place, text, task.name, words)
        )
    return list(instructions.values())


def words_of(
    config: RunConfig, task: Task, tokenize: Callable[[str], Sequence[int]] | None = None
) -> TaskWords:
    """Return what the rules need to know of a task; the length is that of its longest prompt."""
    lengths = [
        prompt.num_virtual_tokens
        for prompt in config.prompts
        if prompt.task == task.name and (prompt.init.open or prompt.init.text)
    ]
    template = "" if task.messages else PLACEHOLDER.sub(" ", task.input)
    return TaskWords(task.choices or (), template, max(lengths, default=None), tokenize)


def _texts(config: RunConfig) -> Iterator[tuple[Task, str, str]]:
    for i, task in enumerate(config.tasks):
        for j, text in enumerate(task.hand_written):
            yield task, f"tasks.{i}.hand_written.{j}", text
        if task.system:
            yield task, f"tasks.{i}.system", task.system
    for i, prompt in enumerate(config.prompts):
        if prompt.init.text:
            yield config.task(prompt.task), f"prompts.{i}.init.text", prompt.init.text


def _tokenizer(model: str) -> Callable[[str], Sequence[int]] | None:
    """Return the ends of a text's tokens, without loading a model; None without the file."""
    path = Path(model) / "tokenizer.json"
    if not path.is_file():
        return None
    from tokenizers import Tokenizer  # only where there is a file

    tokenizer = Tokenizer.from_file(str(path))

    def token_ends(text: str) -> list[int]:
        return [end for _, end in tokenizer.encode(text, add_special_tokens=False).offsets]

    return token_ends
