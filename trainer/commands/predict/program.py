"""``promptshard predict`` on all ranks: plan, base, blocks of predictions, output file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainer.api import base_digests
from trainer.commands.predict.output_file import OutputFile
from trainer.commands.predict.plan import ID, ROW, Options, PredictionPlan, make_plan
from trainer.data.task_data import EvalSet
from trainer.evaluation.scoring import Request
from trainer.inference.engine import close_engine, open_engine
from trainer.inference.input_rows import InputRows
from trainer.inference.loaded_base import InferenceBase
from trainer.inference.opened_base import OpenedBase, open_inference_base
from trainer.inference.predictions import (
    Prediction,
    encode_rows,
    generates,
    num_texts,
    predict,
)
from trainer.runtime import stop_signals
from trainer.runtime.console import Console
from trainer.runtime.log_folder import inference_logs

#: Rows of a block, per rank: the first block, the largest, and the largest if texts are generated.
#: A stopped command repeats at most one block.
FIRST_ROWS, MOST_ROWS, MOST_GENERATED = 8, 256, 64

#: Rows of a task as tokenized for one ``Prompt.placement``.
EncodedRows = Mapping[tuple[str, str], EvalSet]


def run_predict(options: Options, console: Console) -> None:
    """Predict the rows that the output file lacks; a collective.

    Raises:
        BadInput: on all ranks, before the base is loaded.
        Stopped: after a stop signal; the lines of complete blocks are kept.
    """
    plan = make_plan(options)
    settings = plan.run.config.engine
    engine = open_engine(settings.timeout_seconds)
    engine.start_watchdog(inference_logs(options.run_dir), settings.silence_seconds)
    output = OutputFile(options.out) if engine.is_main else None
    with engine.held_on_main(None if output is None else output.locked()):
        identity = plan.identity(options)
        done = engine.run_on_main(
            lambda: None if output is None else output.open(identity, fresh=options.fresh)
        )
        assert done is not None
        if done:
            console.print(f"{options.out}: has {done:,} of {plan.num_rows:,} rows already")
        if done < plan.num_rows:
            digests = engine.run_on_main(lambda: base_digests(options.run_dir))
            opened = open_inference_base(
                engine, plan.run, console, prompts=plan.prompts, digests=digests
            )
            encoded = engine.run_on_all(lambda: encode(opened, plan, console))
            base = opened.load(console)
            stop_signals.defer()
            Predictor(base, plan, encoded, output).run(done, console)
    prompts = ", ".join(prompt.name for prompt in plan.prompts)
    console.print(f"{options.out}: {plan.num_rows:,} rows, predicted by {prompts}")
    close_engine(engine)


def encode(base: OpenedBase | InferenceBase, plan: PredictionPlan, console: Console) -> EncodedRows:
    encoded: dict[tuple[str, str], EvalSet] = {}
    for name, given in plan.rows.items():
        positions = {prompt.placement for prompt in plan.prompts if prompt.task.name == name}
        sets = encode_rows(
            base.files, base.config.prompts, given, positions, base.date, console.working
        )
        encoded |= {(name, position): rows for position, rows in sets.items()}
    return encoded


@dataclass
class Predictor:
    """Predicts blocks of rows and appends them to the output, which only rank 0 has."""

    base: InferenceBase
    plan: PredictionPlan
    encoded: EncodedRows
    output: OutputFile | None

    def run(self, done: int, console: Console) -> None:
        prompts = [self.base.soft_prompt(prompt) for prompt in self.plan.prompts]
        values = [prompt for prompt in prompts if prompt is not None]
        total = sum(
            num_texts([request], has_targets=given.has_targets)
            for given, _, request in self._requests(done, self.plan.num_rows)
        )
        undecided = Counter[str]()
        with console.phase("predicting", total, "texts", announce=True) as phase:
            for start, stop in self._blocks(done):
                columns = {}
                for task, given in self.plan.rows.items():
                    own = [r for r in self._requests(start, stop) if r[0] is given]
                    predictions = predict(
                        self.base.evaluator,
                        [request for _, _, request in own],
                        values,
                        has_targets=given.has_targets,
                        skip_special_tokens=self.plan.run.config.task(task).metric == "execution",
                        advance=phase.advance,
                    )
                    for (_, name, request), made in zip(own, predictions, strict=True):
                        columns[name] = dict(zip(request.rows.row_numbers, made, strict=True))
                        undecided[name] += sum(prediction.is_undecided for prediction in made)
                if self.output is not None:
                    self.output.append(self._records(range(start, stop), columns))
        counts = [f"{count:,} by {name}" for name, count in undecided.items() if count]
        if counts and self.output is not None:
            console.warn(
                f"rows without a prediction: {', '.join(counts)}; the likelihoods of their choices "
                "are not finite. Use another prompt, or train again with a lower learning_rate"
            )

    def _blocks(self, done: int) -> Iterator[tuple[int, int]]:
        """Yield (start, stop) of the blocks after the first ``done`` rows.

        Blocks do not depend on the time that they take, so that a command that was interrupted
        packs, and therefore rounds, as one that was not.
        """
        slow = any(generates(given.task) for given in self.plan.rows.values())
        ranks, start, size = self.base.engine.world_size, 0, FIRST_ROWS
        while start < self.plan.num_rows:
            stop = min(start + size * ranks, self.plan.num_rows)
            if stop > done:
                yield max(start, done), stop
            start, size = stop, min(2 * size, MOST_GENERATED if slow else MOST_ROWS)

    def _requests(self, start: int, stop: int) -> list[tuple[InputRows, str, Request]]:
        """Return a request for the rows of a block for every prompt."""
        requests = []
        for number, prompt in enumerate(self.plan.prompts):
            rows = self.encoded[prompt.task.name, prompt.placement]
            first, last = np.searchsorted(rows.row_numbers, [start, stop]).tolist()
            request = Request(rows.subset(range(first, last)), number)
            requests.append((self.plan.rows[prompt.task.name], prompt.name, request))
        return requests

    def _records(
        self, numbers: Sequence[int], columns: Mapping[str, Mapping[int, Prediction]]
    ) -> Iterator[dict[str, Any]]:
        ids = next(iter(self.plan.rows.values())).ids
        for number in numbers:
            record: dict[str, Any] = {ROW: number + 1}
            if ids is not None:
                record[ID] = ids[number]
            for prompt in self.plan.prompts:  # a row without a prediction was skipped
                made = columns[prompt.name].get(number, Prediction(skipped=True))
                record[prompt.name] = made.as_json()
            yield record
