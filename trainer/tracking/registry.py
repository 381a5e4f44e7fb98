"""Register prompts as versions of a model, and hand-written prompts as MLflow prompts.

Versions are found by tags and hand-written prompts by their text, so repeated calls register
nothing twice.
"""

from __future__ import annotations

import logging
import os
import string
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config import LOWER_IS_BETTER
from trainer.config.task import VIRTUAL_TOKENS, split_template
from trainer.tracking.logged_models import BEST, EXTERNAL
from trainer.tracking.mlflow_store import IDENTITY, MlflowStore
from trainer.tracking.model_files import base_digests, write_model
from trainer.tracking.run_files import mapping, mappings, named
from trainer.tracking.run_metadata import PromptResult, clean_tags, dataset_fields

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion

logger = logging.getLogger(__name__)
ALIAS = "best"
#: Tags of a version: its score, and the rows on which it is comparable with others.
SCORE, SCORED_ON = "validation_score", "validation_digest"
#: MLflow's tags of a prompt's version, and the condition for a search that includes prompts.
PROMPT_TEXT = "mlflow.prompt.text"
IS_PROMPT = " AND tags.`mlflow.prompt.is_prompt` = 'true'"


@dataclass(frozen=True)
class Score:
    """A validation score of a version; comparable if metric and rows are equal."""

    metric: str
    value: float
    rows: str  #: digest of the validation rows

    def is_better_than(self, other: Score) -> bool:
        return (
            self.value < other.value if self.metric in LOWER_IS_BETTER else self.value > other.value
        )


@contextmanager
def _as_global_store(uri: str) -> Iterator[None]:
    """Make this the process's store: MLflow's registry looks there for models and runs."""
    from mlflow.tracking._tracking_service.utils import _use_tracking_uri

    variable = "MLFLOW_TRACKING_URI"
    before = os.environ.get(variable)
    try:
        with _use_tracking_uri(uri):
            yield
    finally:
        if before is not None:
            os.environ[variable] = before


class Registry:
    """Registers the prompts of one output folder under a name of the user."""

    def __init__(self, store: MlflowStore, name: str) -> None:
        self.store, self.client, self.name = store, store.client, name
        self.tasks = {task["name"]: task for task in named(store.folder.settings.get("tasks"))}

    def model_name(self, task: str) -> str:
        """Return the name of a task's registered model: the user's name, if it is the only task."""
        legal = "".join(c if c.isalnum() or c in "_.-" else "-" for c in task)
        return self.name if len(self.tasks) < 2 else f"{self.name}-{legal}"

    def register(
        self, prompt: Mapping[str, Any], model: LoggedModel, result: PromptResult
    ) -> ModelVersion:
        """Upload the model's files and create its version, if there is none; update the alias."""
        name = self.model_name(str(prompt["task"]))
        self._upload(str(prompt["name"]), model)
        identity = {IDENTITY: self.store.output_id, "prompt": str(prompt["name"])}
        versions = list(self._versions(name))
        known = [v for v in versions if all(v.tags.get(k) == t for k, t in identity.items())]
        if known:
            version = known[0]
        else:
            self._create_model(name, str(prompt["task"]))
            with _as_global_store(self.store.target.uri):
                version = self.client.create_model_version(
                    name,
                    f"models:/{model.model_id}",
                    run_id=model.source_run_id,
                    model_id=model.model_id,
                    tags={**self._tags(prompt, result), **identity},
                    description=f"Prompt {prompt['name']} of run {self.store.folder.name}",
                    await_creation_for=0,
                )
        self._move_alias(name, version)
        return version

    def _upload(self, prompt: str, model: LoggedModel) -> None:
        self.store.check_artifact_uri(model.artifact_location)
        with tempfile.TemporaryDirectory(prefix="promptshard-model-") as folder:
            write_model(self.store.folder, prompt, model, Path(folder))
            self.client.log_model_artifacts(model.model_id, folder)
        if EXTERNAL in (model.tags or {}):
            self.client.delete_logged_model_tag(model.model_id, EXTERNAL)

    def _tags(self, prompt: Mapping[str, Any], result: PromptResult) -> dict[str, str]:
        folder, task = self.store.folder, str(prompt["task"])
        metric = str(self.tasks[task].get("metric"))
        value = result.metrics.get(f"validation_{metric}{BEST}")
        base = folder.prompt_params(prompt).get("base.model")
        rows = [e for e in folder.datasets(task) if e.get("split") == "validation"]
        digests = base_digests(folder)
        return clean_tags(
            {
                "task": task,
                "metric": metric,
                SCORE: None if value is None else repr(float(value)),
                SCORED_ON: dataset_fields(rows[0])[0]["digest"] if rows else None,
                "base_model": base,
                "base_weights_sha256": digests.get("base.model, its weights"),
            }
        )

    def _create_model(self, name: str, task: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self.client.create_registered_model(
                name, description=f"Soft prompts for task {task}, trained with promptshard"
            )
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _versions(self, name: str, condition: str = "") -> Iterator[ModelVersion]:
        """Yield the versions of a registered model or prompt; nothing if there is none."""
        token = None
        while True:
            page = self.client.search_model_versions(
                f"name = '{name}'{condition}", page_token=token
            )
            yield from page
            token = page.token
            if not token:
                return

    def _move_alias(self, name: str, version: ModelVersion) -> None:
        """Give the alias to ``version`` if it is better than the version that has it.

        It stays if the scores are not comparable: a change of the validation rows must not replace
        a version that is in use.
        """
        aliases = self.client.get_registered_model(name).aliases
        if ALIAS not in aliases:
            self.client.set_registered_model_alias(name, ALIAS, version.version)
            return
        best = self.client.get_model_version(name, aliases[ALIAS])
        new, old = _score(version), _score(best)
        if best.version == version.version or new is None:
            return
        if old is None or (new.metric, new.rows) != (old.metric, old.rows):
            logger.warning(
                "%s: alias %s stays at version %s: version %s is scored on other validation rows",
                *(name, ALIAS, best.version, version.version),
            )
        elif new.is_better_than(old):
            self.client.set_registered_model_alias(name, ALIAS, version.version)

    def register_hand_written(self) -> None:
        """Register the hand-written prompts of all tasks, and link them to the parent run."""
        parent = self.store.run_ids[None]
        scored = mapping(self.store.folder.summary().get("tasks"))
        for name, task in self.tasks.items():
            texts = [str(text) for text in task.get("hand_written") or ()]
            if not texts:
                continue
            registered = f"{self.model_name(name)}-hand-written"
            known = {v.tags.get(PROMPT_TEXT): v for v in self._versions(registered, IS_PROMPT)}
            scores = {
                row.get("text"): row
                for row in mappings(mapping(scored.get(name)).get("hand_written"))
            }
            for text in texts:
                template = template_of(text, task)
                version: Any = known.get(template)
                if version is None:
                    version = self.client.register_prompt(
                        registered,
                        template,
                        commit_message=f"Hand-written prompt for task {name}",
                        tags=clean_tags({"task": name}),
                    )
                metric = f"validation_{task.get('metric')}"
                score = scores.get(text, {}).get(metric)
                if isinstance(score, int | float) and metric not in version.tags:
                    # Not in ``register_prompt``, which shows tags as those of all versions, too.
                    self.client.set_prompt_version_tag(
                        registered, version.version, metric, f"{float(score):.6g}"
                    )
                with _as_global_store(self.store.target.uri):
                    self.client.link_prompt_version_to_run(
                        parent, f"prompts:/{registered}/{version.version}"
                    )


def template_of(text: str, task: Mapping[str, Any]) -> str:
    """Return a hand-written prompt with the task's input, as a template of MLflow: ``{{text}}``."""
    written = task.get("input")
    if not isinstance(written, str) or task.get("messages"):
        return text
    parts = []
    for literal, field, *_ in string.Formatter().parse(written):
        parts.append(literal)
        if field:
            parts.append(text if field == VIRTUAL_TOKENS else f"{{{{{field}}}}}")
    joined = "".join(parts)
    return joined if split_template(written) else text + joined


def _score(version: ModelVersion) -> Score | None:
    tags = version.tags
    try:
        return Score(tags["metric"], float(tags[SCORE]), tags.get(SCORED_ON, ""))
    except (KeyError, ValueError):
        return None
