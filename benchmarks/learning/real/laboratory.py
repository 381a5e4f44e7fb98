"""Runs jobs: baselines and PEFT in this process, this trainer's arms as runs of their own."""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.learning.peers import FROM_TEXT, Data, peft_model, plain_base
from benchmarks.learning.real import own_runs, packed_peft
from benchmarks.learning.real.cells import Cell, Cells, key_of
from benchmarks.learning.real.files import HELD_BACK, Files
from benchmarks.learning.real.own_runs import OURS
from benchmarks.learning.real.packed_peft import OPTIMIZER, PEERS, PackedModel, common_tokens, score
from benchmarks.learning.real.plan import (
    BASELINES,
    HAND_WRITTEN,
    MAJORITY,
    NO_PROMPT,
    SHOTS,
    STEP_PROFILE,
    Design,
    Job,
    jobs,
)
from benchmarks.learning.real.profile import step_costs
from trainer.config import RunConfig
from trainer.config.ranking import ScoreKey, score_key
from trainer.data.task_data import EvalSet

NUM_SHOTS = 8
NUM_VIRTUAL_TOKENS = 20
#: Training rows to read for a baseline that needs none.
FEWEST_ROWS = 32
#: Increase when code here changes the results of the baselines and of PEFT.
VERSION = 1


class Laboratory:
    """Runs jobs and keeps their results."""

    def __init__(self, files: Files, cells: Cells) -> None:
        self.files, self.cells = files, cells
        self._adapters = files.folder / "adapters"
        self._adapters.mkdir(exist_ok=True)
        self._data: dict[tuple[str, int, int], Data] = {}

    # --- what is there ---

    def settings(self, cell: Cell) -> dict[str, Any]:
        """Return the resolved settings of a cell, which are a part of its key."""
        digest = self.files.digest(cell.task, cell.rows, cell.validation_rows)
        if cell.arm in OURS:
            return own_runs.settings_of(cell, self._own_task(cell), digest)
        shared = {"version": VERSION, "rows": digest, "held_back": HELD_BACK}
        if cell.arm == STEP_PROFILE:
            return shared
        if cell.arm in BASELINES:
            return shared | ({"shots": NUM_SHOTS} if cell.arm == SHOTS else {})
        arm = PEERS[cell.arm]
        settings = shared | OPTIMIZER | {"method": arm.method.name, **arm.method.settings}
        settings |= own_runs.choice_of_step(cell.steps)
        if arm.method == FROM_TEXT:
            settings["text"] = self.instruction(cell)
        return settings

    def result(self, cell: Cell) -> dict[str, Any] | None:
        return self.cells.get(cell, self.settings(cell))

    def done(self, job: Job) -> bool:
        results = [self.result(cell) for cell in job.cells if cell.rate or cell.arm not in PEERS]
        if len(results) < len(job.cells):  # no rate is known yet
            return False
        return all(r is not None and ("validation" in r or not job.validate) for r in results)

    def missing(self, design: Design) -> Iterator[Job]:
        """Yield the jobs that are not done, without cells that are done."""
        for job in jobs(design, self.best_rate, self.files.num_train):
            if not self.done(job):
                cells = tuple(c for c in job.cells if job.validate or self.result(c) is None)
                yield replace(job, cells=cells)

    def best_rate(self, cell: Cell) -> float | None:
        """Rate with the lowest loss on the held-out rows, of those tried so far."""
        losses = {}
        for rate in PEERS[cell.arm].rates:
            result = self.result(replace(cell, rate=rate))
            if result is not None:
                losses[result["held_back"]["loss"]] = rate
        return losses[min(losses)] if losses else None

    def instruction(self, cell: Cell) -> str:
        """The best of the five instructions on the held-out rows; it is given to all arms."""
        baseline = Cell(*(HAND_WRITTEN, cell.task, 0, 0, 0, cell.validation_rows, cell.words))
        result = self.result(baseline)
        texts = self.files.questions[cell.task].texts
        return texts[0] if result is None else texts[result["chosen"]]

    # --- work ---

    def run(self, job: Job) -> None:
        first = job.cells[0]
        if first.arm in OURS:
            self._train_ours(job.cells)
        elif first.arm in BASELINES:
            self._keep(first, self._baseline(first))
        else:
            self._run_peer(first, job.validate)

    def profile(self, cell: Cell) -> None:
        """Measure the cost of a step on the rows of the first update."""
        rows = next(self._data_of(cell).updates(cell.task, cell.seed))
        self._keep(cell, step_costs(self.files.base, rows, NUM_VIRTUAL_TOKENS))

    def _keep(self, cell: Cell, result: dict[str, Any]) -> None:
        result |= {"trainer_commit": trainer_commit()}
        self.cells.put(cell, self.settings(cell), result)

    def _own_task(
        self, cell: Cell, train: str = "train", validation: str = "validation"
    ) -> dict[str, Any]:
        """Section of the task in this trainer's run file, with the paths of its rows."""
        section = self.files.questions[cell.task].section(train=train, validation=validation)
        return section | {"hand_written": [self.instruction(cell)]}

    def _write_rows(self, cell: Cell) -> dict[str, str]:
        """Write the rows of a cell; return the paths of train, validation and held-out rows."""
        task, name = cell.task, f"{cell.task}-{cell.words}-words"
        parts = {
            "train": (f"train.{cell.rows}", self.files.train(task, cell.rows)),
            "validation": (
                f"validation.{cell.validation_rows}",
                self.files.validation(task, cell.validation_rows),
            ),
            "held_back": ("held_back", self.files.held_back(task)),
        }
        return {
            part: self.files.write(f"{name}.{end}", rows) for part, (end, rows) in parts.items()
        }

    def _train_ours(self, cells: tuple[Cell, ...]) -> None:
        first = cells[0]
        name = f"run-{first.task}-{first.rows}-rows-{first.steps}-steps-{first.seed}"
        output = self.files.folder / name
        paths = self._write_rows(first)
        task = self._own_task(first, paths["train"], paths["held_back"])
        run = own_runs.run_sections(cells, task, str(self.files.base), str(output))
        results = own_runs.train(cells, run, paths["validation"], self.files.folder)
        for cell, result in zip(cells, results, strict=True):
            self._keep(cell, result)

    @cached_property
    def _base(self) -> Any:
        return plain_base(str(self.files.base))

    def _data_of(self, cell: Cell) -> Data:
        """Rows of a task as tokens; the held-out rows are its shifted validation."""
        rows = cell.rows or FEWEST_ROWS
        key = cell.task, rows, cell.tokens_per_step
        if key not in self._data:
            question = self.files.questions[cell.task]
            paths = self._write_rows(replace(cell, rows=rows))
            task = question.section(
                train=paths["train"],
                validation=paths["validation"],
                shifted_validation=paths["held_back"],
            )
            front = {"task": cell.task, "position": "front"}
            prompts = [{"name": f"p{s}", "seed": s, **front} for s in range(5)]
            config = RunConfig.model_validate(
                {
                    "output_dir": "-",
                    "base": {"model": str(self.files.base), "quantization": "none"},
                    "tasks": [task | {"hand_written": list(question.texts)}],
                    "prompts": prompts,
                    "training": {
                        "steps": max(1, cell.steps),
                        "tokens_per_step": max(1, cell.tokens_per_step),
                    },
                }
            )
            self._data[key] = Data(config)
        return self._data[key]

    def _baseline(self, cell: Cell) -> dict[str, Any]:
        data = self._data_of(cell)
        task = data.tasks[cell.task]
        rows, held_back = task.evaluation["validation"], task.evaluation["shifted_validation"]
        if cell.arm == MAJORITY:
            answer = self.files.majority(cell.task, cell.rows)
            labels = [
                row["label"] for row in self.files.validation(cell.task, cell.validation_rows)
            ]
            correct = [int(label == answer) for label in labels]
            accuracy = sum(correct) / len(correct)
            return {"validation": {"accuracy": accuracy, "correct": correct}, "answer": answer}
        started = time.perf_counter()
        result: dict[str, Any] = {}
        if cell.arm == HAND_WRITTEN:
            on_held_back = [self._score_base(r) for r in task.hand_written["shifted_validation"]]
            best = min(
                range(len(on_held_back)),
                key=lambda i: (-on_held_back[i]["accuracy"], on_held_back[i]["loss"]),
            )
            result["chosen"] = best
            result["held_back"] = [
                {"loss": one["loss"], "accuracy": one["accuracy"]} for one in on_held_back
            ]
            result["validation"] = self._score_base(task.hand_written["validation"][best])
        elif cell.arm == SHOTS:
            result["validation"] = self._score_base(rows, self._shots(cell, rows))
        else:
            assert cell.arm == NO_PROMPT
            result["validation"] = self._score_base(rows)
            scores = self._score_base(held_back)
            result["held_back"] = {k: scores[k] for k in ("loss", "accuracy")}
        return result | {"seconds": round(time.perf_counter() - started, 1)}

    def _score_base(self, rows: EvalSet, before: tuple[int, ...] | None = None) -> dict[str, Any]:
        common = common_tokens(c[0] for c in rows.candidates)
        model = PackedModel(self._base, common if before is None else before, len(common))
        return score(model, rows)

    def _shots(self, cell: Cell, rows: EvalSet) -> tuple[int, ...]:
        """Tokens of a dialogue with examples: as many of each answer as possible."""
        question = self.files.questions[cell.task]
        chosen: list[dict[str, str]] = []
        pool = self.files.train(cell.task, cell.rows)
        by_label = {label: [r for r in pool if r["label"] == label] for label in question.choices}
        while len(chosen) < NUM_SHOTS:
            for label in question.choices:
                if by_label[label] and len(chosen) < NUM_SHOTS:
                    chosen.append(by_label[label].pop(0))
        random.Random(cell.seed).shuffle(chosen)
        turns = []
        for row in chosen:
            turns.append({"role": "user", "content": f"{row['text']}\n{question.cue}:"})
            turns.append({"role": "assistant", "content": row["label"]})
        tokenizer = self._data_of(cell).tokenizer
        example = rows.candidates[0][0]
        text = rows.rows[example.row]["text"]
        turns.append({"role": "user", "content": f"{text}\n{question.cue}:"})
        text_of_all = tokenizer.apply_chat_template(
            turns, add_generation_prompt=True, tokenize=False
        )
        ids = tokenizer(text_of_all, add_special_tokens=False)["input_ids"]
        common = common_tokens(c[0] for c in rows.candidates)
        own = list(example.input_ids[len(common) : example.target_start])
        assert ids[-len(own) :] == own, "the template writes a row differently after examples"
        return tuple(ids[: -len(own)])

    def _run_peer(self, cell: Cell, validate: bool) -> None:
        data = self._data_of(cell)
        task = data.tasks[cell.task]
        rows, held_back = task.evaluation["validation"], task.evaluation["shifted_validation"]
        every = [task.train[i] for i in range(len(task.train))]
        common = common_tokens([*every, *(c[0] for s in (rows, held_back) for c in s.candidates)])
        arm = PEERS[cell.arm]
        model = peft_model(
            self._base,
            arm.method,
            seed=cell.seed,
            text=self.instruction(cell),
            num_virtual_tokens=NUM_VIRTUAL_TOKENS,
        )
        result = dict(self.result(cell) or {})
        file = self._adapters / f"{key_of(cell, self.settings(cell))}.safetensors"
        if result and file.exists():
            _set(model, load_file(file))
            model.eval()
        else:
            assert cell.rate is not None
            best = BestStep(model, common, held_back, own_runs.validated_steps(cell.steps))
            updates = data.updates(cell.task, cell.seed)
            result = packed_peft.train(model, updates, common, cell.steps, cell.rate, best.after)
            result |= best.restore()
            save_file(_trained(model), file)
        if validate:
            started = time.perf_counter()
            result["validation"] = score(PackedModel(model, common), rows)
            result["validation_seconds"] = round(time.perf_counter() - started, 1)
        self._keep(cell, result)


class BestStep:
    """Keeps the adapter of the best step on the held-out rows, by the trainer's ranking."""

    def __init__(
        self, model: Any, common: tuple[int, ...], rows: EvalSet, steps: Sequence[int]
    ) -> None:
        self._model, self._common, self._rows, self._steps = model, common, rows, steps
        self._best: tuple[ScoreKey, int, dict[str, float]] | None = None
        self._tensors: dict[str, torch.Tensor] = {}

    def after(self, step: int) -> None:
        """Score the model after a step, if it is one of those to choose from."""
        if step not in self._steps:
            return
        self._model.eval()
        found = score(PackedModel(self._model, self._common), self._rows)
        self._model.train()
        scores = {key: found[key] for key in ("loss", "accuracy")}
        rank = score_key({f"validation_{key}": x for key, x in scores.items()}, "accuracy")
        if self._best is None or rank < self._best[0]:
            self._best, self._tensors = (rank, step, scores), _trained(self._model)

    def restore(self) -> dict[str, Any]:
        """Put the best adapter into the model; return its step and its scores."""
        assert self._best is not None
        _set(self._model, self._tensors)
        self._model.eval()
        return {"step": self._best[1], "held_back": self._best[2]}


def trainer_commit() -> str:
    """Last commit that changed the folder ``trainer``; empty outside a clone."""
    root = Path(__file__).resolve().parents[3]
    command = ["git", "-C", str(root), "log", "-1", "--format=%h", "--", "trainer"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def _trained(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def _set(model: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.copy_(tensors[name])
