"""One LoggedModel per prompt: MLflow's table of models compares the prompts of all runs.

A model has the prompt's settings as params and the scores of the saved adapter, each linked to its
dataset. Models of an output folder are found by the same tag as its runs, so repeated calls create
no second model. A score is sent with key, time and step of the run's point: MLflow's stores keep
such a duplicate once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from trainer.tracking.mlflow_store import IDENTITY, MlflowStore
from trainer.tracking.refusals import http_status
from trainer.tracking.run_metadata import PromptResult, clean_tags, dataset_fields, legal
from trainer.tracking.store_uri import sync_command

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel, Metric

MODEL_TYPE = "soft-prompt"
#: MLflow's tag of models whose files are not in the model's own folder; here they are in the run's.
EXTERNAL = "mlflow.model.isExternal"
#: Characters that MLflow refuses in the name of a model.
FORBIDDEN = "/:.%\"'"
#: Suffix of the scores of the saved adapter; others are of its baselines.
BEST = "_best"
#: By prefix of a metric: the split on which it is measured. The longer prefix comes first.
SPLITS = {"shifted_validation": "shifted_validation", "validation": "validation"}
#: Description of a model.
NOTE = (
    "The PEFT adapter is in the folder `adapter` of the source run's artifacts. To register this "
    "prompt with files that MLflow can load, run `{command} --register NAME`."
)
NO_MODELS = "this MLflow server has no models (it is older than MLflow 3); runs are complete"


class NoModels(Exception):
    """The server is older than MLflow 3."""


class PromptModels:
    """The models of one output folder. Methods may raise errors of network or MLflow.

    Raises:
        NoModels: the store has no models.
    """

    def __init__(self, store: MlflowStore) -> None:
        self.store, self.client = store, store.client
        self.models: dict[str, LoggedModel] = {}
        for model in _find(store):
            self.models.setdefault(str((model.tags or {}).get("prompt")), model)

    def send(self, prompt: Mapping[str, Any], result: PromptResult) -> LoggedModel:
        """Create the model of a prompt if there is none; add what it lacks.

        Args:
            result: its metrics must be points of the prompt's run already.
        """
        name = str(prompt["name"])
        run_id = self.store.run_ids[name]
        model = self.models.get(name) or self._create(prompt, run_id)
        self.models[name] = model
        self.client.set_logged_model_tags(model.model_id, dict(result.tags))
        run = self.client.get_run(run_id)
        outputs = run.outputs.model_outputs if run.outputs else []
        if model.model_id not in {output.model_id for output in outputs}:
            from mlflow.entities import LoggedModelOutput

            self.client.log_outputs(run_id, [LoggedModelOutput(model.model_id, result.step)])
        points = {point.key: point for point in run.data._metric_objs}
        keys = [legal(key) for key in result.metrics if key.endswith(BEST)]
        self._link([points[key] for key in keys if key in points], model, run_id, prompt)
        if str(model.status) != "READY":
            self.client.finalize_logged_model(model.model_id, "READY")
        return model

    def _create(self, prompt: Mapping[str, Any], run_id: str) -> LoggedModel:
        folder = self.store.folder
        name = "".join("-" if c in FORBIDDEN else c for c in str(prompt["name"]))
        tags = {**folder.prompt_tags(prompt), IDENTITY: self.store.output_id, EXTERNAL: "true"}
        tags["mlflow.note.content"] = NOTE.format(command=sync_command(folder.path.resolve()))
        return self.client.create_logged_model(
            self.store.experiment_id,
            name=name,
            source_run_id=run_id,
            tags=clean_tags(tags),
            params=folder.prompt_params(prompt),
            model_type=MODEL_TYPE,
        )

    def _link(
        self, points: list[Metric], model: LoggedModel, run_id: str, prompt: Mapping[str, Any]
    ) -> None:
        """Link points of the prompt's run to its model and to their datasets."""
        from mlflow.entities import Metric

        entries = self.store.folder.datasets(prompt.get("task"))
        datasets = {entry.get("split"): dataset_fields(entry)[0] for entry in entries}
        known = {(metric.key, metric.timestamp, metric.step) for metric in model.metrics or ()}
        metrics = []
        for point in points:
            if (point.key, point.timestamp, point.step) not in known:
                split = next(
                    (s for prefix, s in SPLITS.items() if point.key.startswith(prefix)), ""
                )
                fields = datasets.get(split, {})
                metrics.append(
                    Metric(
                        point.key,
                        point.value,
                        point.timestamp,
                        point.step,
                        model_id=model.model_id,
                        dataset_name=fields.get("name"),
                        dataset_digest=fields.get("digest"),
                    )
                )
        if metrics:
            self.client.log_batch(run_id, metrics=metrics)


def _find(store: MlflowStore) -> Iterator[LoggedModel]:
    """Yield the models of an output folder, the oldest first."""
    from mlflow.exceptions import MlflowException

    token = None
    while True:
        try:
            page = store.client.search_logged_models(
                [store.experiment_id],
                f"tags.`{IDENTITY}` = '{store.output_id}'",
                order_by=[{"field_name": "creation_time", "ascending": True}],
                page_token=token,
            )
        except MlflowException as error:
            if http_status(error) in (404, 405):
                raise NoModels(NO_MODELS) from error
            raise
        yield from page
        token = page.token
        if not token:
            return
