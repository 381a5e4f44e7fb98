"""Send the finished prompts of a run as models, and register them on request."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from trainer.tracking.logged_models import NoModels, PromptModels
from trainer.tracking.mlflow_store import HANGING_SECONDS, MlflowStore
from trainer.tracking.progress_file import StoreProgress
from trainer.tracking.refusals import explain
from trainer.tracking.registry import Registry
from trainer.tracking.run_files import mapping, named
from trainer.tracking.run_metadata import FinalResults, PromptResult, RunMetadata, file_digest
from trainer.tracking.store_uri import StoreAddress

logger = logging.getLogger(__name__)
#: Key of the hand-written prompts in ``StoreProgress.registered``; no prompt can have this name.
HAND_WRITTEN = "/hand-written"


class ModelSender:
    """Sends models of new and changed adapters; ``StoreProgress`` records what was sent.

    Args:
        register: name of the registered model; default: ``tracking.register``.
        prompts: names of the prompts to register; empty: the best one of each task.
    """

    def __init__(
        self,
        folder: RunMetadata,
        progress: StoreProgress,
        target: StoreAddress,
        register: str | None = None,
        prompts: Sequence[str] = (),
    ) -> None:
        self.folder, self.progress, self.target, self.given = folder, progress, target, register
        self.chosen = prompts

    @property
    def register(self) -> str | None:
        """The name under which prompts are registered; only those of a finished run are."""
        finished = self.folder.summary().get("status") == "finished"
        return (self.given or self.folder.tracking.register_as) if finished else None

    def forget(self) -> None:
        """Send everything again: the store has lost its runs."""
        self.progress.models, self.progress.registered = {}, {}

    def unsent(self) -> dict[str, Any]:
        """Return descriptions of what the store lacks, each true if it lacks any."""
        if self.progress.lacks:
            return {}
        models, unregistered = self._models(), self._unregistered()
        return {
            f"{len(models)} models": models,
            f"{len(unregistered)} entries of the model registry": unregistered,
        }

    def send(
        self, store: MlflowStore, results: FinalResults, save: Callable[[], None]
    ) -> list[Exception]:
        """Send what the store lacks. What fails is tried again at the next call.

        Args:
            save: stores the progress; called after each model.
        """
        models, unregistered, errors = self._models(), self._unregistered(), list[Exception]()
        if not models and not unregistered:
            return errors
        try:
            sender = PromptModels(store)
            self.progress.lacks = None
        except NoModels as error:
            self.progress.lacks = str(error)
            logger.warning("%s", error)
            return errors
        prompts = {str(prompt["name"]): prompt for prompt in self.folder.prompts}
        registry = Registry(store, self.register) if self.register else None
        for name in {**models, **unregistered}:
            started = time.monotonic()
            try:
                if name == HAND_WRITTEN:
                    assert registry is not None
                    registry.register_hand_written()
                else:
                    result = results.prompts.get(name, PromptResult(0, {}, {}))
                    model = sender.send(prompts[name], result)
                    if name in models:
                        self.progress.models[name] = models[name]
                    if registry is not None and name in unregistered:
                        registry.register(prompts[name], model, result)
            except Exception as error:
                text = explain(error, self.target, self.folder.path)
                logger.warning("model of prompt %s: not sent: %s", name, text)
                errors.append(error)
                if time.monotonic() - started > HANGING_SECONDS:
                    break
                continue
            if name in unregistered:
                self.progress.registered[name] = unregistered[name]
            save()
        return errors

    def _models(self) -> dict[str, str]:
        """Return the prompts whose model is missing or of an older adapter, with its digest."""
        digests, sent = self._digests(), self.progress.models
        return {name: digest for name, digest in digests.items() if sent.get(name) != digest}

    def _unregistered(self) -> dict[str, str]:
        """Return the prompts that are not registered, with name and digest of what is missing."""
        name = self.register
        if name is None:
            return {}
        chosen = self.chosen or self._best()
        digests = {k: digest for k, digest in self._digests().items() if k in chosen}
        texts = {task["name"]: task.get("hand_written") for task in self._tasks()}
        if any(texts.values()):
            digests[HAND_WRITTEN] = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
        entries = {prompt: f"{name} {digest}" for prompt, digest in digests.items()}
        sent = self.progress.registered
        return {prompt: entry for prompt, entry in entries.items() if sent.get(prompt) != entry}

    def _best(self) -> list[str]:
        """Return the selected prompt of each task; of a task without ranking, all prompts."""
        selected = mapping(self.folder.summary().get("selected"))
        return [
            str(prompt["name"])
            for prompt in self.folder.prompts
            if mapping(selected.get(str(prompt.get("task")))).get("prompt", prompt["name"])
            == prompt["name"]
        ]

    def _tasks(self) -> list[dict[str, Any]]:
        return named(self.folder.settings.get("tasks"))

    def _digests(self) -> dict[str, str]:
        """Return the digest of each prompt's adapter; empty if the run has not ended."""
        adapters = self.folder.adapters() if self.folder.summary() else {}
        return {name: file_digest(path) for name, path in adapters.items()}
