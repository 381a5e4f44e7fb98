"""Generate the pretraining documents of the tiny base model and the rows of the example tasks.

A document is ``[instruction NEWLINE] text NEWLINE "Answer:" answer``. Each text has several valid
answers, and only the instruction selects one. A ward note names an illness, a medicine and a test;
each is metabolic, cardiac or other, so the same labels answer three questions. Documents without an
instruction mostly answer a question that the example task does not ask, so that the base model
without a prompt answers the wrong question.

The split of a text follows from its hash, so no row of a task occurs in pretraining.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from examples import programs

CUE = "\nAnswer:"
SPLITS = ("pretrain", "train", "valid", "shifted")
HOME, SHIFTED = "home", "shifted"


@dataclass(frozen=True)
class Document:
    """One pretraining document; ``question`` names the kind of answer (for the checks)."""

    task: str
    question: str
    instruction: str
    text: str
    answer: str

    @property
    def input(self) -> str:
        """Everything before the answer."""
        return (self.instruction + "\n" if self.instruction else "") + self.text + CUE


@dataclass(frozen=True)
class Aspect:
    """One thing that a text mentions and instructions ask for.

    Attributes:
        words: what can be mentioned, by label.
        frames: clauses with ``{e}``, the word, by context.
        phrases: what instructions call the thing.
        unasked: how often it is what a document without instruction means.
    """

    words: dict[str, tuple[str, ...]]
    frames: dict[str, tuple[str, ...]]
    phrases: tuple[str, ...]
    unasked: float

    def label(self, word: str) -> str:
        return next(label for label, words in self.words.items() if word in words)


@dataclass(frozen=True)
class Scene:
    """A family of short texts that mention one word of every aspect; the first one is wanted."""

    task: str
    labels: tuple[str, ...]
    aspects: dict[str, Aspect]
    fillers: dict[str, tuple[str, ...]]
    ask_label: tuple[str, ...]
    ask_name: tuple[str, ...]

    @property
    def wanted(self) -> str:
        """The aspect that the example task asks for."""
        return next(iter(self.aspects))


def _load_scenes() -> dict[str, Scene]:
    scenes = json.loads(Path(__file__).with_name("scenes.json").read_text(encoding="utf-8"))
    for task, scene in scenes.items():
        aspects = {name: Aspect(**_tuples(aspect)) for name, aspect in scene.pop("aspects").items()}
        scenes[task] = Scene(task=task, aspects=aspects, **_tuples(scene))
    return scenes


def _tuples(value: Any) -> Any:
    """Turn the lists of a JSON value into tuples."""
    if isinstance(value, dict):
        return {key: _tuples(inner) for key, inner in value.items()}
    return tuple(value) if isinstance(value, list) else value


SCENES = _load_scenes()
PEOPLE = {
    HOME: ("a man of {n}", "a woman of {n}", "the patient", "Mr Brown", "Ms Reed"),
    SHIFTED: ("my husband", "a neighbour", "a man of {n}", "a woman of {n}", "a colleague"),
}
VAGUE = (
    "Read the following.",
    "Consider this text.",
    "Here is a text.",
    "Look at this.",
    "Answer.",
    "Give the answer.",
    "Read carefully and answer.",
    "Please reply.",
)


def split_of(content: str) -> str:
    """The split that a piece of content belongs to: 80% pretrain, 10% train, 5% and 5%."""
    bucket = zlib.crc32(content.encode()) % 20
    if bucket < 16:
        return "pretrain"
    return "train" if bucket < 18 else "valid" if bucket == 18 else "shifted"


def sentence(words: str) -> str:
    """A clause as a sentence."""
    return words[0].upper() + words[1:] + "."


def scene_text(
    rng: random.Random, scene: Scene, words: dict[str, str], context: str, split: str
) -> str:
    """A text of the split that mentions a word of each given aspect, in any order."""
    while True:
        clauses = []
        for aspect, word in words.items():
            who = rng.choice(PEOPLE[context]).format(n=rng.randrange(20, 90))
            frame = rng.choice(scene.aspects[aspect].frames[context])
            clauses.append(frame.format(who=who, e=word))
        clauses += rng.sample(scene.fillers[context], rng.randrange(0, 2))
        rng.shuffle(clauses)
        text = " ".join(sentence(clause) for clause in clauses)
        if split_of(text) == split:
            return text


def scene_words(rng: random.Random, scene: Scene) -> dict[str, str]:
    """A word of every aspect; each label once, so that no question has another's answer."""
    labels = rng.sample(scene.labels, len(scene.labels))
    pairs = zip(scene.aspects.items(), labels, strict=True)
    return {name: rng.choice(aspect.words[label]) for (name, aspect), label in pairs}


def scene_document(rng: random.Random, scene: Scene) -> Document:
    """A pretraining document of a scene, with the question named or left open.

    Some texts leave aspects out: a text with a single one teaches what its word means, which the
    model needs before it can learn to choose among three.
    """
    context = HOME if rng.random() < 0.7 else SHIFTED
    words = scene_words(rng, scene)
    kept = rng.sample(list(words), rng.choices((1, 2, 3), (2, 2, 6))[0])
    words = {name: word for name, word in words.items() if name in kept}
    text = scene_text(rng, scene, words, context, "pretrain")
    draw = rng.random()
    if draw < 0.15:  # nothing asked, or nothing in particular
        instruction = "" if draw < 0.09 else rng.choice(VAGUE)
        (name,) = rng.choices(kept, [scene.aspects[name].unasked for name in kept])
        question, answer = "open", scene.aspects[name].label(words[name])
    else:
        name = rng.choice(kept)
        phrase = rng.choice(scene.aspects[name].phrases)
        wants_name = draw < 0.3
        asks = scene.ask_name if wants_name else scene.ask_label
        instruction = _blur(rng, rng.choice(asks).format(np=phrase))
        question = "name" if wants_name else name
        answer = words[name] if wants_name else scene.aspects[name].label(words[name])
    return Document(scene.task, question, instruction, text, answer)


def code_document(rng: random.Random) -> Document:
    """A pretraining document that says a small program in words and then in another form."""
    story = rng.random() < 0.3
    program = _program(rng, "pretrain", numeric=story)
    text = programs.story(rng, program) if story else programs.describe(rng, program)
    draw = rng.random()
    if draw < 0.15:  # with nothing asked, people mostly just say it again
        question, instruction = "open", "" if draw < 0.09 else rng.choice(VAGUE)
        (form,) = rng.choices(("words", "javascript", "lisp", "def"), (6, 2, 1, 1))
    else:
        question = form = rng.choice(sorted(programs.FORMS))
        instruction = _blur(rng, rng.choice(programs.FORMS[form].instructions))
    return Document("codegen", question, instruction, text, programs.FORMS[form].render(program))


def _blur(rng: random.Random, instruction: str) -> str:
    """Sometimes lose words of an instruction, as people do."""
    if rng.random() < 0.7:
        return instruction
    words = instruction.split(" ")
    return " ".join(word for word in words if rng.random() > 0.12) or words[-1]


def documents(seed: int) -> Iterator[Document]:
    """An endless stream of pretraining documents."""
    rng = random.Random(seed)
    while True:
        draw = rng.random()
        if draw < 0.37:
            yield scene_document(rng, SCENES["triage"])
        elif draw < 0.74:
            yield scene_document(rng, SCENES["animals"])
        else:
            yield code_document(rng)


def _program(rng: random.Random, split: str, numeric: bool = False) -> programs.Program:
    while True:
        program = programs.draw(rng, numeric=numeric)
        if split_of(programs.FORMS["def"].render(program)) == split:
            return program


def scene_rows(scene: Scene, split: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Rows of a scene's task: labels in equal shares, no text twice."""
    rng = random.Random(f"{scene.task}.{split}.{seed}")
    context = SHIFTED if split == "shifted" else HOME
    rows: dict[str, str] = {}
    while len(rows) < count:
        label = scene.labels[len(rows) % len(scene.labels)]
        words = scene_words(rng, scene)
        if scene.aspects[scene.wanted].label(words[scene.wanted]) == label:
            rows.setdefault(scene_text(rng, scene, words, context, split), label)
    shuffled = [{"text": text, "label": label} for text, label in rows.items()]
    rng.shuffle(shuffled)
    return shuffled


def code_rows(split: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Rows of the code task; ``tests`` are calls that the written function must get right."""
    rng = random.Random(f"codegen.{split}.{seed}")
    rows: dict[str, dict[str, Any]] = {}
    while len(rows) < count:
        program = _program(rng, split, numeric=split == "shifted")
        write = programs.story if split == "shifted" else programs.describe
        text = write(rng, program)
        code = programs.FORMS["def"].render(program)
        rows.setdefault(text, {"text": text, "code": code, "tests": programs.tests(program)})
    return list(rows.values())


def task_rows(task: str, split: str, count: int, seed: int) -> list[dict[str, Any]]:
    """The rows of one data file."""
    if task == "codegen":
        return code_rows(split, count, seed)
    return scene_rows(SCENES[task], split, count, seed)
