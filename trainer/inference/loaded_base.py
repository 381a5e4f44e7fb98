"""A base with the prompts of a run: encodes requests, generates texts, scores rows."""

from __future__ import annotations

import datetime
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self, overload

from torch import nn
from transformers import PreTrainedTokenizerBase

from trainer.config import RunConfig, Task
from trainer.data.tokenization.chat_template import Messages
from trainer.distributed.deepspeed_engine import Engine
from trainer.distributed.model_loading import LoadedBase
from trainer.evaluation.evaluator import Evaluator
from trainer.evaluation.generation import generate
from trainer.evaluation.scoring import Request
from trainer.inference.engine import close_engine
from trainer.inference.input_rows import read_rows
from trainer.inference.predictions import Prediction, encode_rows, predict
from trainer.inference.requests import (
    API_NAMES,
    MESSAGES,
    GenerationRequest,
    RequestNames,
    dialogue_request,
    text_request,
)
from trainer.inference.saved_run import SavedRun, TrainedPrompt
from trainer.inference.trained_prompts import load_prompts
from trainer.model.checkpoint_files import BaseFiles
from trainer.prompts.soft_prompt import SoftPrompt
from trainer.runtime.errors import BadInput


def _release(engine: Engine, model: nn.Module) -> None:
    engine.release(model)
    close_engine(engine)


#: A prompt by its name in the run, or of any run on the same base; None: the base alone.
PromptChoice = str | TrainedPrompt | None


@dataclass
class InferenceBase:
    """A base on this rank and the prompts that it can use; see ``opened_base``.

    Attributes:
        config: of the run, or of ``opened_base.settings_of``.
        run: None if the base was loaded without a run.
        date: the date that chat templates read; None: today.
    """

    engine: Engine
    files: BaseFiles
    config: RunConfig
    loaded: LoadedBase
    run: SavedRun | None
    date: datetime.date | None
    _soft_prompts: dict[Path, SoftPrompt] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Not a method: DeepSpeed keeps references to the model, so memory is freed only by release.
        self._close = weakref.finalize(self, _release, self.engine, self.loaded.model)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.files.tokenizer

    @cached_property
    def evaluator(self) -> Evaluator:
        return Evaluator(self.engine, self.loaded.model, self.tokenizer, self.loaded.budget)

    def _check_open(self) -> None:
        if not self._close.alive:
            raise BadInput("the base is closed; load it again with load_base")

    def prompt(self, choice: PromptChoice) -> TrainedPrompt | None:
        """Return the prompt with a name; raises ``BadInput`` if the run has no such prompt."""
        if not isinstance(choice, str):
            return choice
        if self.run is None:
            raise BadInput(
                f"prompt: {choice!r} is a name, but the base was loaded without a run; pass a "
                "prompt of load_run(...).prompts"
            )
        return self.run.prompts[choice]

    def soft_prompt(self, choice: PromptChoice) -> SoftPrompt | None:
        """Return a prompt's values on the device, read once.

        Raises:
            BadInput: the adapter is damaged, or was trained for a base of another width.
        """
        prompt = self.prompt(choice)
        if prompt is None:
            return None
        key = prompt.folder.resolve()
        if key not in self._soft_prompts:
            (values,) = load_prompts([prompt.folder], self.files, self.engine.device)
            self._soft_prompts[key] = values
        return self._soft_prompts[key]

    def task(self, prompt: TrainedPrompt | None, name: str | None = None) -> Task:
        """Return a prompt's task, the task with a name, or the only task of the run.

        Raises:
            BadInput: the run has no such task, or several tasks and none is named.
        """
        if name is None and prompt is not None:
            return prompt.task
        tasks = {task.name: task for task in self.config.tasks}
        if name is not None and name not in tasks:
            raise BadInput(f"task: {name!r} is not a task of the run; known: {', '.join(tasks)}")
        if name is None and len(tasks) > 1:
            raise BadInput(
                f"task: without a prompt, name one of {', '.join(tasks)}, whose template is used"
            )
        return tasks[name] if name is not None else next(iter(tasks.values()))

    def _chosen(
        self, choice: PromptChoice, task: str | None
    ) -> tuple[Task, SoftPrompt | None, str]:
        """Return task, values and ``Prompt.placement`` for a prompt, or for the base alone."""
        prompt = self.prompt(choice)
        own, values = self.task(prompt, task), self.soft_prompt(prompt)
        return own, values, "front" if prompt is None else prompt.placement

    def text_request(
        self,
        text: str,
        prompt: PromptChoice = None,
        *,
        task: str | None = None,
        max_new_tokens: int | None = None,
        names: RequestNames = API_NAMES,
    ) -> GenerationRequest:
        """Make the request for one text; raises ``BadInput`` as ``requests.text_request``."""
        own, values, placement = self._chosen(prompt, task)
        return text_request(
            self.files, own, text, values, placement, max_new_tokens, self.date, names
        )

    def dialogue_request(
        self,
        messages: Messages,
        prompt: PromptChoice = None,
        *,
        task: str | None = None,
        max_new_tokens: int | None = None,
        names: RequestNames = MESSAGES,
    ) -> GenerationRequest:
        """Make the request for the next answer; raises as ``requests.dialogue_request``."""
        own, values, placement = self._chosen(prompt, task)
        return dialogue_request(
            self.files, own, messages, values, placement, max_new_tokens, self.date, names
        )

    @overload
    def generate(  # type: ignore[overload-overlap]  # a str is a Sequence[str]
        self,
        texts: str,
        prompt: PromptChoice = None,
        *,
        task: str | None = None,
        max_new_tokens: int | None = None,
    ) -> str: ...
    @overload
    def generate(
        self,
        texts: Sequence[str],
        prompt: PromptChoice = None,
        *,
        task: str | None = None,
        max_new_tokens: int | None = None,
    ) -> list[str]: ...
    def generate(
        self,
        texts: str | Sequence[str],
        prompt: PromptChoice = None,
        *,
        task: str | None = None,
        max_new_tokens: int | None = None,
    ) -> str | list[str]:
        """Continue one text or several, greedily; a collective.

        A text fills the input template of the task if that has one column; otherwise it is the
        complete input. All ranks receive all texts.

        Args:
            prompt: name of a prompt of the run, or a prompt of any run on the same base; None: the
                base alone.
            task: name of the task whose template and end are used; default: that of the prompt, or
                the only one of the run.
            max_new_tokens: maximum length of each answer; default: the task's.

        Raises:
            BadInput: a name is not known, or a text has no tokens or too many.
        """
        self._check_open()
        given = [texts] if isinstance(texts, str) else list(texts)
        requests = [
            self.text_request(
                *(text, prompt),
                task=task,
                max_new_tokens=max_new_tokens,
                names=RequestNames("texts" if isinstance(texts, str) else f"texts[{i}]"),
            )
            for i, text in enumerate(given)
        ]
        answers = self.generate_requests(requests)
        return answers[0] if isinstance(texts, str) else answers

    def score(
        self,
        rows: str | Sequence[Mapping[str, Any]],
        prompt: PromptChoice = None,
        *,
        task: str | None = None,
        use_targets: bool = True,
    ) -> list[Prediction]:
        """Predict rows, and compute the likelihoods of their targets if they have any.

        A collective: all ranks receive all predictions, in the order of the rows.

        Args:
            rows: mappings from the columns of the task to values, or the path of a file of rows.
            prompt, task: as in ``generate``.
            use_targets: False: ignore targets, which may then be missing or empty.

        Raises:
            BadInput: with the problems of all rows, or a name is not known.
        """
        own, values, placement = self._chosen(prompt, task)
        prompts, chosen = list(self.config.prompts), self.prompt(prompt)
        if chosen is not None:  # may be of another run
            prompts.append(chosen.settings.model_copy(update={"task": own.name}))
        self._check_open()
        given = self.engine.run_on_all(lambda: read_rows(rows, own, use_targets=use_targets))
        sets = self.engine.run_on_all(
            lambda: encode_rows(self.files, prompts, given, [placement], self.date)
        )
        encoded = sets[placement]
        request = Request(encoded, None if values is None else 0)
        (made,) = predict(
            self.evaluator,
            [request],
            [] if values is None else [values],
            has_targets=given.has_targets,
            skip_special_tokens=own.metric == "execution",
        )
        predictions = [Prediction(skipped=True)] * len(encoded.rows)
        for number, prediction in zip(encoded.row_numbers, made, strict=True):
            predictions[number] = prediction
        return predictions

    def generate_requests(self, requests: Sequence[GenerationRequest]) -> list[str]:
        """Generate the texts of requests with the same prompt and limit; a collective."""
        if not requests:
            return []
        first = requests[0]
        generated = generate(
            *(self.engine, self.loaded.model, first.stop),
            [request.input_ids for request in requests],
            first.prompt,
            first.max_new_tokens,
            max_tokens=self.loaded.budget.generation_tokens(),
            prompt_at=[request.prompt_at for request in requests],
        )
        return [first.stop.text(text.ids, skip_special_tokens=True).strip() for text in generated]

    def close(self) -> None:
        """Free the memory of the base and end the engine; other methods fail afterwards."""
        self._soft_prompts.clear()
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
