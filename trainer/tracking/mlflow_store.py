"""Log to an MLflow store: a parent run, one nested run per prompt, every point at most once.

On connecting, the store is searched for this folder's runs by a tag, and points of a metric up to
the last step in the store are left out. A batch whose response was lost is sent again with the same
time, step and value; MLflow's stores keep such duplicates once.
"""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from trainer.config.tracking import Tracking
from trainer.runtime.redact import redact
from trainer.tracking import sqlite_store, tables
from trainer.tracking.metrics_log import Line
from trainer.tracking.progress_file import StoreProgress
from trainer.tracking.refusals import Refused
from trainer.tracking.run_metadata import (
    Artifact,
    FinalResults,
    RunMetadata,
    clean_tags,
    dataset_fields,
    legal,
)
from trainer.tracking.store_uri import StoreAddress, sync_command

if TYPE_CHECKING:
    from mlflow.entities import Experiment, Metric, Param, Run
    from mlflow.tracking import MlflowClient

logger = logging.getLogger(__name__)
Entity = TypeVar("Entity")
#: The page that draws the curves of all prompts in one chart. Sorting by name unfolds nested runs,
#: and without a workflow type MLflow opens its pages for language model calls.
PAGE = (
    "#/experiments/{}/runs?compareRunsMode=CHART&workflowType=machine_learning"
    "&orderByKey=tags.%60mlflow.runName%60&orderByAsc=true"
)
IDENTITY, PARENT, PLACE = "promptshard.output_id", "mlflow.parentRunId", "output_dir"
FINAL_TAGS = {"stopped", "selected"}  # of ``FinalResults``
MAX_METRICS, MAX_PARAMS = 1000, 100  # of one batch
MAX_RUN_NAME = 250  # of MLflow's databases; those other than SQLite refuse longer names
#: After a call that took longer and failed, other files and models wait for the next round.
HANGING_SECONDS = 5.0
REFUSED = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")
MISSING = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


class MlflowStore:
    """The runs of one output folder in a store. Methods may raise errors of network or MLflow."""

    def __init__(self, folder: RunMetadata, target: StoreAddress, output_id: str) -> None:
        from mlflow.tracking import MlflowClient

        if target.database is not None:
            assert target.artifacts is not None
            sqlite_store.prepare(target.database, target.artifacts)
        self.folder, self.target, self.output_id = folder, target, output_id
        self.client: MlflowClient = MlflowClient(target.uri)
        self.run_ids: dict[str | None, str] = {}  #: prompt -> run id; None: the parent
        #: run id -> metric -> step and value of the last point
        self.last_points: dict[str, dict[str, tuple[int, float]]] = {}
        self.outdated: dict[str, set[str]] = {}  #: run id -> tags in the store of an earlier end
        self.experiment_id = ""
        self._place = folder.tags()[PLACE]
        self.is_new = False  #: ``attach`` has created runs: the store lacks all their data

    def attach(self, progress: StoreProgress, *, running: bool) -> None:
        """Find this folder's runs or create them; if ``running``, mark them as running again.

        Runs that were deleted in MLflow are created again.
        """
        experiment = self._experiment(progress)
        self.experiment_id = progress.experiment_id = experiment.experiment_id
        runs = self._find_runs(experiment.experiment_id)
        names = [str(prompt["name"]) for prompt in self.folder.prompts]
        self.is_new = not runs.keys() >= {None, *names}
        parent = runs.get(None) or self._create_parent(experiment.experiment_id)
        self._adopt(None, parent, self.folder.params(), self.folder.datasets(), running)
        for name, prompt in zip(names, self.folder.prompts, strict=True):
            run = runs.get(name) or self.client.create_run(
                experiment.experiment_id,
                run_name=_run_name(self.folder.name, f" / {name}"),
                start_time=self.folder.start_ms,
                tags={
                    **self.folder.prompt_tags(prompt),
                    IDENTITY: self.output_id,
                    PARENT: parent.info.run_id,
                },
            )
            if run.data.tags.get(PARENT) != parent.info.run_id:  # the parent was deleted
                self.client.set_tag(run.info.run_id, PARENT, parent.info.run_id)
            datasets = self.folder.datasets(prompt.get("task"))
            self._adopt(name, run, self.folder.prompt_params(prompt), datasets, running)
        progress.run_id = parent.info.run_id
        progress.prompts = {name: i for name, i in self.run_ids.items() if name is not None}
        progress.page = PAGE.format(experiment.experiment_id)

    def _experiment(self, progress: StoreProgress) -> Experiment:
        """Return the run's experiment; create it if none has its name; refuse a deleted one."""
        name = self.folder.tracking.experiment
        if name == Tracking().experiment:  # the environment replaces the default only
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or name
        experiment = self._known_experiment(progress)
        if experiment is None or (
            experiment.lifecycle_stage != "active" and experiment.name != name
        ):
            experiment = self.client.get_experiment_by_name(name) or self._create_experiment(name)
        if experiment.lifecycle_stage != "active":
            raise Refused(
                f"experiment {experiment.name!r} is deleted in MLflow; restore it (mlflow "
                f"experiments restore --experiment-id {experiment.experiment_id}, with "
                "MLFLOW_TRACKING_URI set), or set tracking.experiment to another name"
            )
        return experiment

    def _known_experiment(self, progress: StoreProgress) -> Experiment | None:
        """Return the experiment of this folder's runs, or the one that the environment names."""
        known = progress.experiment_id if progress.run_id is not None else None
        if known and (experiment := _unless_missing(self.client.get_experiment, known)):
            return experiment
        if run_id := os.environ.get("MLFLOW_RUN_ID"):
            run = _unless_missing(self.client.get_run, run_id)
            if run is None or run.info.lifecycle_stage != "active":
                raise Refused(f"MLFLOW_RUN_ID={run_id}: MLflow has no such run; unset it")
            return self.client.get_experiment(run.info.experiment_id)
        number = os.environ.get("MLFLOW_EXPERIMENT_ID")
        is_default = self.folder.tracking.experiment == Tracking().experiment
        if number and is_default and not os.environ.get("MLFLOW_EXPERIMENT_NAME"):
            if experiment := _unless_missing(self.client.get_experiment, number):
                return experiment
            raise Refused(
                f"MLFLOW_EXPERIMENT_ID={number}: MLflow has no such experiment; correct or unset it"
            )
        return None

    def _create_experiment(self, name: str) -> Experiment:
        from mlflow.exceptions import MlflowException

        tags = {"mlflow.experimentKind": "custom_model_development"}  # opens on runs and curves
        try:
            self.client.create_experiment(name, self.target.artifacts, tags)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another run created it just now
                raise
        experiment = self.client.get_experiment_by_name(name)
        assert experiment is not None
        return experiment

    def _find_runs(self, experiment_id: str) -> dict[str | None, Run]:
        """Return this folder's runs by prompt; the parent run has the key None."""
        runs: dict[str | None, Run] = {}
        token = None
        while True:
            page = self.client.search_runs(
                [experiment_id],
                f"tags.`{IDENTITY}` = '{self.output_id}'",
                max_results=1000,
                order_by=["attributes.start_time ASC"],
                page_token=token,
            )
            for run in page:
                is_prompt = run.data.tags.get("kind") == "prompt"
                runs.setdefault(run.data.tags.get("prompt") if is_prompt else None, run)
            token = page.token
            if not token:
                return runs

    def _create_parent(self, experiment_id: str) -> Run:
        """Create the parent run, or use the one of ``$MLFLOW_RUN_ID``."""
        tags = {**self.folder.tags(), IDENTITY: self.output_id}
        run_id = os.environ.get("MLFLOW_RUN_ID")
        owner = run_id and self.client.get_run(run_id).data.tags.get(IDENTITY, self.output_id)
        if run_id and owner == self.output_id:
            for key, value in tags.items():
                self.client.set_tag(run_id, key, value)
            return self.client.get_run(run_id)
        if run_id:
            logger.warning(
                "MLFLOW_RUN_ID=%s is the run of another output folder; created a new run", run_id
            )
        return self.client.create_run(
            experiment_id,
            run_name=_run_name(self.folder.name),
            start_time=self.folder.start_ms,
            tags=tags,
        )

    def _adopt(
        self,
        prompt: str | None,
        run: Run,
        params: Mapping[str, str],
        datasets: Sequence[Mapping[str, Any]],
        running: bool,
    ) -> None:
        """Use a run for a prompt, and log params and datasets that it does not have."""
        run_id = run.info.run_id
        self.run_ids[prompt] = run_id
        # The public `data.metrics` has values without steps.
        self.last_points[run_id] = {m.key: (m.step, m.value) for m in run.data._metric_objs}
        self.outdated[run_id] = FINAL_TAGS & run.data.tags.keys()
        if running and run.info.status != "RUNNING":
            self.client.update_run(run_id, status="RUNNING")
        if running and run.data.tags.get(PLACE) != self._place:  # the folder was moved
            self.client.set_tag(run_id, PLACE, self._place)
        self._log_params(run_id, params, run.data.params)
        if datasets and not (run.inputs and run.inputs.dataset_inputs):
            self._log_datasets(run_id, datasets)

    def _log_params(self, run_id: str, params: Mapping[str, str], known: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        new = [Param(key, value) for key, value in params.items() if key not in known]
        for i in range(0, len(new), MAX_PARAMS):
            self._log_batch(run_id, params=new[i : i + MAX_PARAMS])
        # MLflow's params are immutable; the new value of a resumed run becomes a tag.
        for key, value in params.items():
            if known.get(key, value) != value:
                for tag, text in clean_tags({f"resumed.{key}": value}).items():
                    self.client.set_tag(run_id, tag, text)

    def _log_datasets(self, run_id: str, datasets: Sequence[Mapping[str, Any]]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = [
            DatasetInput(Dataset(**fields), [InputTag("mlflow.data.context", context)])
            for fields, context in map(dataset_fields, datasets)
        ]
        self.client.log_inputs(run_id, datasets=inputs)

    def send(self, lines: Iterable[Line], *, final: bool = False) -> int:
        """Send the points that the store does not have; return their number.

        Args:
            final: also send a point that has another value than the store's last one of the same
                step; MLflow shows the one with the later time.
        """
        from mlflow.entities import Metric

        points: dict[str, list[Metric]] = defaultdict(list)
        for line in lines:
            run_id = self.run_ids.get(line.prompt)
            if run_id is None:
                logger.warning("metrics of %r: no such prompt in run.yaml; left out", line.prompt)
                continue
            values = dict(line.metrics)
            if line.useful_tokens is not None:
                values["useful_tokens"] = line.useful_tokens
            last_points = self.last_points[run_id]
            for name, value in values.items():
                key = legal(name)
                step, known = last_points.get(key, (-1, value))
                if line.step > step or (final and line.step == step and value != known):
                    last_points[key] = line.step, value
                    points[run_id].append(Metric(key, value, int(line.time * 1000), line.step))
        for run_id, metrics in points.items():
            for i in range(0, len(metrics), MAX_METRICS):
                self._log_batch(run_id, metrics=metrics[i : i + MAX_METRICS])
        return sum(map(len, points.values()))

    def _log_batch(
        self, run_id: str, metrics: Sequence[Metric] = (), params: Sequence[Param] = ()
    ) -> None:
        """Send a batch; if the store refuses the content, send its items one by one.

        Raises:
            MlflowException: the run was deleted, or an outage.
        """
        from mlflow.exceptions import MlflowException

        try:
            self.client.log_batch(run_id, metrics=metrics, params=params)
            return
        except MlflowException as error:
            if error.error_code not in REFUSED or not self._is_active(run_id):
                raise
            if len(metrics) + len(params) == 1:
                logger.warning("%s: refused: %s", (*metrics, *params)[0].key, error)
                return
        for metric in metrics:
            self._log_batch(run_id, metrics=[metric])
        for param in params:
            self._log_batch(run_id, params=[param])

    def _is_active(self, run_id: str) -> bool:
        return bool(self.client.get_run(run_id).info.lifecycle_stage == "active")

    def upload(self, artifact: Artifact) -> None:
        """Upload a file to the run of its prompt."""
        run_id = self.run_ids[artifact.prompt]
        if not self.target.trusted:
            self.check_artifact_uri(self.client.get_run(run_id).info.artifact_uri)
        if artifact.table is not None:
            assert artifact.text is not None
            rows = tables.to_json(artifact.table(artifact.path))
            self.client.log_text(run_id, self.target.hide(rows), artifact.text)
            known = self.client.get_run(run_id).data.tags.get(tables.TAG)
            self.client.set_tag(run_id, tables.TAG, tables.add_to_tag(known, artifact.text))
        elif artifact.text:
            text = self.target.hide(artifact.path.read_text(encoding="utf-8"))
            self.client.log_text(run_id, text, artifact.text)
        else:
            self.client.log_artifact(run_id, str(artifact.path), artifact.folder or None)

    def check_artifact_uri(self, artifact_uri: str) -> None:
        """Require that an untrusted server stores the files of a run or model itself.

        Otherwise the server could name a folder of this machine, or storage that the user pays for.
        """
        uri = urlsplit(str(artifact_uri))
        if self.target.trusted:
            return
        if uri.scheme != "mlflow-artifacts" or uri.netloc:
            raise Refused(
                f"{self.target.name} stores files at {redact(uri.geturl())}; confirm that it is "
                f"yours: {sync_command(self.folder.path, self.target.name)}"
            )

    def end(self, status: str, results: FinalResults | None, time: float) -> None:
        """Send final results (None if the run was killed), status and end time in Unix seconds."""
        if results is not None:
            lines = []
            for name, result in results.prompts.items():
                lines.append(Line(time, result.step, None, name, dict(result.metrics)))
                run_id = self.run_ids[name]
                for key, value in result.tags.items():
                    self.client.set_tag(run_id, key, value)
                for key in self.outdated[run_id] - result.tags.keys():
                    self.client.delete_tag(run_id, key)
                self.outdated[run_id] = set()
            self.send(lines, final=True)
            note = self.target.hide(results.note)
            self.client.set_tag(self.run_ids[None], "mlflow.note.content", note)
        parent_last = sorted(self.run_ids.items(), key=lambda item: item[0] is None)
        for _, run_id in parent_last:
            self.client.set_terminated(run_id, status, end_time=int(time * 1000))


def _run_name(folder: str, suffix: str = "") -> str:
    return folder[: MAX_RUN_NAME - len(suffix)] + suffix


def _unless_missing(get: Callable[[str], Entity], key: str) -> Entity | None:
    from mlflow.exceptions import MlflowException

    try:
        return get(key)
    except MlflowException as error:
        if error.error_code not in MISSING:
            raise
        return None
