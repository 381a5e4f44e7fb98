"""One arm of an evaluation: how the rows of a task are read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from trainer.data.task_data import EvalSet
from trainer.evaluation.pass_at_k import TOP_P, Samples

#: Kinds of arms, in the order of the table.
KINDS = (
    "no_prompt",
    "hand_written",
    "shots",
    "retrieved",
    "knn",
    "prompt",
    "prompt_retrieved",
    "adapter",
)


@dataclass(frozen=True)
class Neighbors:
    """Train rows among which kNN prompting finds neighbors.

    Attributes:
        count: number of neighbors that vote.
        inputs: token ids of every anchor, up to its answer.
        labels: index of the correct choice of every anchor.
        places: of the anchors in their files.
        excluded: anchors that are the same as a row, for every row.
    """

    count: int
    inputs: Sequence[tuple[int, ...]]
    labels: Sequence[int]
    places: Sequence[str]
    excluded: Sequence[Sequence[int]]

    def digest(self) -> str:
        values = (self.count, self.inputs, self.labels, self.excluded)
        return hashlib.sha256(repr(values).encode()).hexdigest()


@dataclass(frozen=True)
class Similar:
    """Train rows that are similar to every row.

    Attributes:
        chosen: their indices, the most similar one last.
        seconds: time to build an index of the train rows.
        query_tokens: mean number of tokens that the base reads to retrieve them; 0 for BM25.
        num_bytes: size of the index, without the texts.
    """

    chosen: Sequence[Sequence[int]]
    seconds: float
    query_tokens: float = 0.0
    num_bytes: int = 0


@dataclass(frozen=True)
class Arm:
    """One way to prompt the base, on the rows of a task.

    Attributes:
        kind: one of ``KINDS``.
        rows: as this arm tokenizes them.
        prompt: index among the loaded prompts; None: no soft prompt.
        adapter: index among the loaded LoRA and IA3 adapters; None: the base alone.
        virtual_tokens: number of positions of the soft prompt.
        text: hand-written prompt.
        num_bytes: size of texts, index or weights, without the base.
        setup_seconds: time to prepare the arm; training excluded.
        examples: places of the examples in context of every row.
        query_tokens: mean number of tokens that the base reads to retrieve them.
        neighbors: of kNN prompting; None for other arms.
        change: how the rows differ from the validation rows; None if they do not.
        numbers: index of every row in its split.
        samples: how several answers per row are sampled; None: one greedy answer.
    """

    task: str
    name: str
    kind: str
    rows: EvalSet
    prompt: int | None = None
    adapter: int | None = None
    virtual_tokens: int = 0
    text: str | None = None
    num_bytes: int = 0
    setup_seconds: float = 0.0
    examples: Sequence[Sequence[str]] | None = None
    query_tokens: float = 0.0
    neighbors: Neighbors | None = None
    change: str | None = None
    numbers: Sequence[int] = ()
    samples: Samples | None = None

    def about(self) -> dict[str, object]:
        """Describe how the answers of this arm are made, for the files of its predictions."""
        about: dict[str, object] = {"kind": self.kind, "scored_as": self.rows.task.metric}
        if self.text is not None:
            about["text"] = self.text
        if self.change is not None:
            about["change"] = self.change
        if self.samples is not None:
            about["sampled"] = vars(self.samples) | {"top_p": TOP_P}
        return about

    def digest(self, base: str, prompts: Sequence[str], adapters: Sequence[str]) -> str:
        """Digest of everything that the predictions depend on.

        Args:
            base: describes the base and how it computes.
            prompts, adapters: digests of the loaded prompts and adapters.
        """
        digest = hashlib.sha256(base.encode())
        task = self.rows.task
        settings: dict[str, object] = {
            "metric": task.metric,
            "choices": task.choices,
            "multi_label": [task.multi_label, task.label_separator],
            "stop": [task.stop, task.max_new_tokens, task.append_eos],
            "prompt": None if self.prompt is None else prompts[self.prompt],
            "adapter": None if self.adapter is None else adapters[self.adapter],
            "neighbors": None if self.neighbors is None else self.neighbors.digest(),
            "gold": self.rows.gold,
        }
        if task.metric == "execution":
            rows = [self.rows.rows[number] for number in self.rows.row_numbers]
            settings["tests"] = repr([row[task.tests] for row in rows])
        if self.samples is not None:
            sampled = self.samples.count, self.samples.temperature, TOP_P, self.rows.row_numbers
            settings["samples"] = sampled
        digest.update(json.dumps(settings).encode())
        for row in self.rows.candidates:
            for example in row:
                tokens = (example.input_ids, example.label_spans, example.prompt_at)
                digest.update(repr((*tokens, example.branches)).encode())
        return digest.hexdigest()
