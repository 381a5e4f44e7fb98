"""Build the arms of an evaluation: texts, examples, prompts and adapters on the same rows."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from trainer.commands.evaluate.arm import Arm, Neighbors, Similar
from trainer.commands.evaluate.early_fit import NOT_TRUNCATED
from trainer.commands.evaluate.options import Options
from trainer.commands.evaluate.rows import RowEncoder, at_most, halves
from trainer.config import Prompt, RunConfig, Task
from trainer.data.dataset import RowDataset, gold_choices
from trainer.data.examples_in_context import (
    EXAMPLES,
    examples_text,
    fixed_examples,
    with_examples,
)
from trainer.data.perturbations import CHANGES, changed_rows, templates
from trainer.data.retrieval import retrieve
from trainer.data.row_hashing import first_by_hash
from trainer.data.task_data import EvalSet, TaskData
from trainer.evaluation.baselines import VALIDATION
from trainer.evaluation.metric_sums import scored_as
from trainer.prompts.adapter_files import PromptAdapter, WeightAdapter
from trainer.prompts.saved_prompts import WEIGHTS
from trainer.runtime.errors import BadInput

SHIFTED = "shifted_validation"
#: Anchors of kNN prompting: each has a distribution over the vocabulary.
MAX_ANCHORS = 1024


@dataclass
class ArmBuilder:
    """Builds the arms of one task.

    Attributes:
        prompts: the trained prompts of the task to evaluate, and their indices.
        sizes: virtual tokens of every loaded prompt, by index.
        prompt_adapters, weight_adapters: with their indices among loaded prompts and adapters.
        similar: the retrieved train rows; None: those that BM25 retrieves.
    """

    options: Options
    config: RunConfig
    data: TaskData
    encoder: RowEncoder
    prompts: Sequence[tuple[int, Prompt]]
    sizes: Sequence[int]
    prompt_adapters: Sequence[tuple[int, PromptAdapter]] = ()
    weight_adapters: Sequence[tuple[int, WeightAdapter]] = ()
    similar: Similar | None = None

    @property
    def task(self) -> Task:
        return self.data.task

    def build(self) -> list[Arm]:
        """Return all arms of the task, on the same rows in the same order.

        Raises:
            BadInput: examples in context do not fit, or a half of the rows is empty.
        """
        task, rows = self.task.name, self.plain
        if self.options.select_on == "half" and not all(halves(rows)):
            raise BadInput(
                f"--select-on half: the hash of their content puts all {len(rows.candidates)} rows "
                f"of task {task!r} into one half; evaluate more rows, or leave it out"
            )
        arms = [Arm(task, "no_prompt", "no_prompt", rows)]
        texts = zip(self.task.hand_written, self.data.hand_written[VALIDATION], strict=True)
        for number, (text, after_text) in enumerate(texts, 1):
            size = len(text.encode())
            own = self._selected(after_text)
            name = f"hand_written-{number}"
            arms.append(Arm(task, name, "hand_written", own, text=text, num_bytes=size))
        if self.options.shots is not None:
            arms.append(self._shots(self.options.shots))
        if self.options.retrieved is not None:
            arms.append(self._with_similar(self.options.retrieved))
        if self.options.knn is not None:
            arms.append(self._knn(self.options.knn, arms[0]))
        arms += [self._prompt(index, prompt) for index, prompt in self.prompts]
        if self.options.retrieved is not None:
            arms += [
                self._prompt_retrieved(index, prompt, self.options.retrieved)
                for index, prompt in self.prompts
            ]
        arms += self._adapters()
        names, numbers = _unique(arms), rows.row_numbers
        samples = self.options.samples
        arms = [
            replace(arm, name=name, numbers=numbers, samples=samples)
            for arm, name in zip(arms, names, strict=True)
        ]
        if self.options.robustness:
            arms += self._changed(arms)
        return arms

    @cached_property
    def plain(self) -> EvalSet:
        """The selected rows without a prompt."""
        return self._selected(self.data.evaluation[VALIDATION])

    def _selected(self, rows: EvalSet) -> EvalSet:
        """Select the rows to score, with the predictions that the metric is computed from."""
        kept = rows.subset(at_most(rows, self.options.rows))
        return self._for_metric(kept)

    def _for_metric(self, rows: EvalSet) -> EvalSet:
        metric = scored_as(self.options.metric or self.task.metric, self.task)
        return replace(rows, task=self.task.model_copy(update={"metric": metric}))

    def _changed(self, arms: Sequence[Arm]) -> list[Arm]:
        """Return the arms without examples on shifted validation rows and on changed rows."""
        changed, plain = [], self.own_rows()
        # A typo may add tokens; the text is cut rather than refused.
        task = self.task.model_copy(update={"too_long": "truncate"})
        variants: list[tuple[str, RowDataset, Task]] = []
        if task.tokens is None:  # rows of token ids have no text to change
            variants += [(change, changed_rows(plain, task, change), task) for change in CHANGES]
        variants += [(change, plain, other) for change, other in templates(task).items()]
        for arm in arms:
            if arm.kind not in ("no_prompt", "hand_written", "prompt"):
                continue
            position = next(
                (prompt.placement for index, prompt in self.prompts if index == arm.prompt), "front"
            )
            if (shifted := self._shifted(arm, position)) is not None:
                changed.append(shifted)
            for change, rows, other in variants:
                encoded = self.encoder.encode(
                    arm.rows,
                    rows,
                    task=other,
                    virtual_tokens=arm.virtual_tokens,
                    position=position,
                    prefix=arm.text or "",
                )
                changed.append(replace(arm, name=_name(arm, change), rows=encoded, change=change))
        return changed

    def _shifted(self, arm: Arm, position: str) -> Arm | None:
        if SHIFTED not in self.data.evaluation:
            return None
        rows = self.data.evaluation_at(position)[SHIFTED]
        if arm.text is not None:
            rows = self.data.hand_written[SHIFTED][self.task.hand_written.index(arm.text)]
        rows = self._selected(rows)
        name = _name(arm, SHIFTED)
        return replace(arm, name=name, rows=rows, change=SHIFTED, numbers=rows.row_numbers)

    def _prompt(self, index: int, prompt: Prompt) -> Arm:
        folder = self.options.run_dir / "prompts" / prompt.name
        rows = self._selected(self.data.evaluation_at(prompt.placement)[VALIDATION])
        size = (folder / WEIGHTS).stat().st_size
        return Arm(
            *(self.task.name, prompt.name, "prompt", rows, index),
            virtual_tokens=self.sizes[index],
            num_bytes=size,
        )

    def _shots(self, count: int) -> Arm:
        train, drawn = self.data.train_rows, self._drawn
        chosen = [drawn] * len(self.plain.candidates)
        arm = self._with_examples("shots", count, chosen, f"--shots {count}")
        shown = [train[index] for index in drawn]
        return replace(arm, num_bytes=_text_bytes(self.task, shown))

    def _knn(self, count: int, plain: Arm) -> Arm:
        """kNN prompting, with the fixed examples of ``--shots`` in context if there are any."""
        train, shots = self.data.train_rows, self.options.shots
        drawn = self._drawn if shots is not None else []
        anchors = np.setdiff1d(first_by_hash(train.hashes(), min(len(train), MAX_ANCHORS)), drawn)
        rows = train.take(anchors, "anchors")
        gold = gold_choices(rows, self.task)
        shown = with_examples(rows, train, [drawn] * len(rows))
        table = self.encoder.table(shown, self.task, per_choice=False)
        kept = table.rows_R.tolist()  # rows that are too long may be skipped
        hashes, own = rows.hashes()[table.rows_R], self.own_rows().hashes()
        excluded = [np.flatnonzero(hashes == hash_).tolist() for hash_ in own]
        most = max(map(len, excluded))
        if (fewest := len(kept) - most) < count:
            differing = " that differ from the row to answer" if most else ""
            raise BadInput(
                f"--knn {count}: only {fewest:,} train rows{differing} are compared; lower it"
            )
        neighbors = Neighbors(
            count,
            [example.input_ids[: example.target_start] for example in table],
            [gold[row] for row in kept],
            [rows.where(row) for row in kept],
            excluded,
        )
        if drawn:
            chosen = [drawn] * len(self.plain.candidates)
            plain = self._with_examples("shots", len(drawn), chosen, f"--shots {shots}")
        size = len(kept) * self.encoder.vocab_size * 2
        return replace(plain, name=f"knn-{count}", kind="knn", neighbors=neighbors, num_bytes=size)

    @cached_property
    def _drawn(self) -> list[int]:
        """Indices of the fixed examples."""
        count, seed = self.options.shots or 0, self.config.training.seed
        drawn = fixed_examples(self.task, self.data.train_rows, count, seed, self.own_rows())
        if len(drawn) < count:
            raise BadInput(
                f"--shots {count}: task {self.task.name!r} has only {len(drawn)} train rows that "
                "are not among the rows to answer; lower it"
            )
        return drawn

    def _prompt_retrieved(self, index: int, prompt: Prompt, count: int) -> Arm:
        plain = self._prompt(index, prompt)
        arm = self._with_similar(count, plain, prompt)
        return replace(arm, name=f"{prompt.name}+{arm.name}", kind="prompt_retrieved")

    def _with_similar(
        self, count: int, plain: Arm | None = None, prompt: Prompt | None = None
    ) -> Arm:
        similar = self.similar or self._by_words
        option = f"--retrieved {count}"
        arm = self._with_examples("retrieved", count, similar.chosen, option, plain, prompt)
        size = _text_bytes(self.task, self.data.train_rows) + similar.num_bytes
        return replace(
            arm,
            name=f"{arm.name}-cosine" if self.options.compares_states else arm.name,
            num_bytes=arm.num_bytes + size,
            setup_seconds=similar.seconds,
            query_tokens=similar.query_tokens,
        )

    @cached_property
    def _by_words(self) -> Similar:
        """The train rows that BM25 retrieves for every row."""
        started = time.perf_counter()
        count = self.options.retrieved or 0
        chosen = retrieve(self.task, self.data.train_rows, self.own_rows(), count)
        fewest = min(map(len, chosen))
        if fewest < count:
            raise BadInput(
                f"--retrieved {count}: task {self.task.name!r} has only {fewest} train rows that "
                "differ from the row to answer; lower it"
            )
        return Similar(chosen, time.perf_counter() - started)

    def own_rows(self) -> RowDataset:
        """The rows to answer."""
        return self.plain.rows.take(np.asarray(self.plain.row_numbers), "evaluated")

    def _with_examples(
        self,
        kind: str,
        count: int,
        chosen: Sequence[Sequence[int]],
        option: str,
        plain: Arm | None = None,
        prompt: Prompt | None = None,
    ) -> Arm:
        train, plain = self.data.train_rows, plain or Arm(self.task.name, "", "", self.plain)
        strict = self.task.model_copy(update={"too_long": "refuse"})

        def encode(rows: RowDataset) -> EvalSet:
            return self.encoder.encode(
                plain.rows,
                rows,
                task=strict,
                virtual_tokens=plain.virtual_tokens,
                position=prompt.placement if prompt else "front",
            )

        try:
            encoded = encode(with_examples(self.own_rows(), train, chosen))
        except BadInput as error:
            reason = _without_remedy(error)  # the rows are not at fault
            if self.task.too_long == "truncate":
                try:
                    encode(self.own_rows())
                except BadInput as alone:
                    raise BadInput(
                        f"{option}: {_without_remedy(alone)} without examples, and {NOT_TRUNCATED}"
                    ) from None
            raise BadInput(
                f"{option}: the context does not hold the examples; lower it: {reason}"
            ) from None
        places = [[train.where(index) for index in indices] for indices in chosen]
        return replace(plain, name=f"{kind}-{count}", kind=kind, rows=encoded, examples=places)

    def _adapters(self) -> list[Arm]:
        rows, task = self.plain, self.task.name
        arms = []
        for index, adapter in self.prompt_adapters:
            room = self.encoder.context_length - self.sizes[index]
            if rows.longest > room:
                raise BadInput(
                    f"--adapter: {adapter.folder}: after its {self.sizes[index]} virtual tokens, "
                    f"{max(0, room)} tokens fit in the context of the base, and a row of task "
                    f"{task!r} has {rows.longest}; evaluate shorter rows with --data, or leave the "
                    "adapter out"
                )
            arm = Arm(task, adapter.name, "adapter", rows, prompt=index)
            arms.append(replace(arm, virtual_tokens=self.sizes[index], num_bytes=adapter.num_bytes))
        for index, weights in self.weight_adapters:
            arm = Arm(task, weights.name, "adapter", rows, adapter=index)
            arms.append(replace(arm, num_bytes=weights.num_bytes))
        return arms


def _without_remedy(error: BadInput) -> str:
    """Return the first problem of rows that are too long, without the advice to shorten them."""
    return re.split(r"[;:] shorten it", error.problems[0])[0]


def _text_bytes(task: Task, rows: Iterable[dict[str, Any]]) -> int:
    """Size of rows as examples in context, in UTF-8."""
    if task.messages is not None:
        return sum(len(repr(row[task.messages]).encode()) for row in rows)
    return sum(len(examples_text(task, {EXAMPLES: [row]}).encode()) for row in rows)


def _name(arm: Arm, change: str) -> str:
    return f"{arm.name}@{change}"


def _unique(arms: Sequence[Arm]) -> list[str]:
    """Names of arms, which are also file names; a repeated one is preceded by the arm's kind."""
    names: list[str] = []
    for arm in arms:
        name = arm.name
        while name in names:
            name = f"{arm.kind}-{name}"
        names.append(name)
    return names
