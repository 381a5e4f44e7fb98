"""The MLflow side: one parent run, one nested run per prompt, and everything at most once.

Nothing is sent twice: on (re)connecting, the store is asked for this folder's runs by a tag and for
the last step it has of every metric; older points are left out. A batch whose answer was lost is
sent again with the same time, step and value, which MLflow's stores keep once.
"""

from __future__ import annotations

import json
import logging
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from trainer.runtime.redact import redact
from trainer.tracking import sqlite_store
from trainer.tracking.final_results import FinalResults
from trainer.tracking.metrics_log import Line
from trainer.tracking.progress_file import StoreProgress
from trainer.tracking.run_metadata import (
    MAX_DIGEST,
    Artifact,
    RunMetadata,
    legal,
)
from trainer.tracking.store_uri import StoreAddress, sync_command

if TYPE_CHECKING:
    from mlflow.entities import Experiment, Metric, Param, Run
    from mlflow.tracking import MlflowClient

logger = logging.getLogger(__name__)
Found = TypeVar("Found")
#: The page where the curves of all prompts lie over each other: sorting by name unfolds the nested
#: runs, and MLflow's pages open as those for language model calls otherwise.
PAGE = (
    "#/experiments/{}/runs?compareRunsMode=CHART&workflowType=machine_learning"
    "&orderByKey=tags.%60mlflow.runName%60&orderByAsc=true"
)
IDENTITY = "promptshard.output_id"
BATCH = {"metrics": 1000, "params": 100}
REFUSED = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")
DEFAULT_EXPERIMENT = "promptshard"


class Refused(Exception):
    """Nothing can be sent until a person changes something: what, and how."""


class MlflowStore:
    """This folder's runs in one MLflow store. Any call may raise whatever the network brings."""

    def __init__(self, folder: RunMetadata, target: StoreAddress, output_id: str) -> None:
        from mlflow.tracking import MlflowClient

        if target.database is not None:
            assert target.artifacts is not None
            sqlite_store.prepare(target.database, target.artifacts)
        self.folder, self.target, self.output_id = folder, target, output_id
        self.client: MlflowClient = MlflowClient(target.uri)
        self.run_ids: dict[str | None, str] = {}  #: prompt -> run id; None: the parent
        self.marks: dict[str, dict[str, int]] = {}  #: run id -> metric -> last step there
        self.is_new = False  #: the store knew nothing of this folder
        self.running = False

    def attach(self, progress: StoreProgress, *, running: bool) -> None:
        """Find this folder's runs, or make them; ``running``: mark them as running again."""
        self.running = running
        experiment = self._experiment(progress)
        progress.experiment_id = experiment.experiment_id
        found = self._find(experiment.experiment_id)
        self.is_new = not found
        parent = found.get(None) or self._parent(experiment.experiment_id)
        self._adopt(None, parent, self.folder.params(), self.folder.datasets())
        for prompt in self.folder.prompts:
            name = str(prompt["name"])
            run = found.get(name) or self.client.create_run(
                experiment.experiment_id,
                run_name=f"{self.folder.name} / {name}",
                start_time=self._start_ms(),
                tags={
                    **self.folder.prompt_tags(prompt),
                    IDENTITY: self.output_id,
                    "mlflow.parentRunId": parent.info.run_id,
                },
            )
            data = self.folder.datasets(prompt.get("task"))
            self._adopt(name, run, self.folder.prompt_params(prompt), data)
        progress.run_id = parent.info.run_id
        progress.prompts = {name: i for name, i in self.run_ids.items() if name is not None}
        progress.page = PAGE.format(experiment.experiment_id)

    def _experiment(self, progress: StoreProgress) -> Experiment:
        """The experiment of the run, made if there is none of its name.

        Raises:
            Refused: it is deleted, or the one that the environment names does not exist.
        """
        found = self._known_experiment(progress)
        if found is None:
            name = str(self.folder.tracking.get("experiment") or DEFAULT_EXPERIMENT)
            if name == DEFAULT_EXPERIMENT:  # the default gives way to the environment
                name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or name
            found = self.client.get_experiment_by_name(name) or self._new_experiment(name)
        if found.lifecycle_stage != "active":
            raise Refused(
                f"experiment {found.name!r} is deleted in MLflow; restore it (mlflow experiments "
                f"restore --experiment-id {found.experiment_id}, with MLFLOW_TRACKING_URI set), or "
                "set tracking.experiment to another name"
            )
        return found

    def _known_experiment(self, progress: StoreProgress) -> Experiment | None:
        """That of this folder's runs, or the one that the environment names by a number."""
        known = progress.experiment_id if progress.run_id is not None else None
        if known is not None and (found := _unless_missing(self.client.get_experiment, known)):
            return found
        run_id = os.environ.get("MLFLOW_RUN_ID")
        if run_id:
            run = _unless_missing(self.client.get_run, run_id)
            if run is None or run.info.lifecycle_stage != "active":
                raise Refused(f"MLFLOW_RUN_ID={run_id}: MLflow has no such run; unset it")
            return self.client.get_experiment(run.info.experiment_id)
        number = os.environ.get("MLFLOW_EXPERIMENT_ID")
        default = self.folder.tracking.get("experiment") in (None, DEFAULT_EXPERIMENT)
        if number and default and not os.environ.get("MLFLOW_EXPERIMENT_NAME"):
            if found := _unless_missing(self.client.get_experiment, number):
                return found
            raise Refused(
                f"MLFLOW_EXPERIMENT_ID={number}: MLflow has no such experiment; correct or unset it"
            )
        return None

    def _new_experiment(self, name: str) -> Experiment:
        from mlflow.exceptions import MlflowException

        tags = {"mlflow.experimentKind": "custom_model_development"}  # opens on runs and curves
        try:
            self.client.create_experiment(name, self.target.artifacts, tags)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # by another run, a moment ago
                raise
        found = self.client.get_experiment_by_name(name)
        assert found is not None
        return found

    def _find(self, experiment_id: str) -> dict[str | None, Run]:
        found: dict[str | None, Run] = {}
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
                found.setdefault(run.data.tags.get("prompt") if is_prompt else None, run)
            token = page.token
            if not token:
                return found

    def _parent(self, experiment_id: str) -> Run:
        tags = {**self.folder.tags(), IDENTITY: self.output_id}
        given = os.environ.get("MLFLOW_RUN_ID")
        owner = given and self.client.get_run(given).data.tags.get(IDENTITY, self.output_id)
        if given and owner != self.output_id:
            logger.warning(
                "MLFLOW_RUN_ID=%s is the run of another output folder; made a new run", given
            )
        if not given or owner != self.output_id:
            return self.client.create_run(
                experiment_id, run_name=self.folder.name, start_time=self._start_ms(), tags=tags
            )
        for key, value in tags.items():
            self.client.set_tag(given, key, value)
        return self.client.get_run(given)

    def _start_ms(self) -> int | None:
        started = self.folder.started
        return None if started is None else int(started * 1000)

    def _adopt(
        self,
        prompt: str | None,
        run: Run,
        params: Mapping[str, str],
        datasets: Sequence[Mapping[str, Any]],
    ) -> None:
        run_id = run.info.run_id
        self.run_ids[prompt] = run_id
        # The public `data.metrics` has the values without their steps.
        self.marks[run_id] = {metric.key: metric.step for metric in run.data._metric_objs}
        if self.running and run.info.status != "RUNNING":
            self.client.update_run(run_id, status="RUNNING")
        self._log_params(run_id, params, run.data.params)
        if datasets and not (run.inputs and run.inputs.dataset_inputs):
            self._log_datasets(run_id, datasets)

    def _log_params(self, run_id: str, params: Mapping[str, str], known: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        new = [Param(key, value) for key, value in params.items() if key not in known]
        for i in range(0, len(new), BATCH["params"]):
            self._batch(run_id, params=new[i : i + BATCH["params"]])
        # Params never change in MLflow; a resumed run's new value becomes a tag.
        for key, value in params.items():
            if key in known and known[key] != value:
                self.client.set_tag(run_id, f"resumed.{key}", value)

    def _log_datasets(self, run_id: str, datasets: Sequence[Mapping[str, Any]]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        contexts = {"train": "training"}
        inputs = []
        for item in datasets:
            split, path = str(item.get("split", "")), str(item.get("path", ""))
            dataset = Dataset(
                name=f"{item.get('task')} {split.replace('_', ' ')}",
                digest=str(item.get("digest", ""))[:MAX_DIGEST],
                source_type="local",
                source=json.dumps({"uri": redact(path)}),
                profile=json.dumps({"num_rows": item.get("rows"), "sha256": item.get("digest")}),
            )
            tag = InputTag("mlflow.data.context", contexts.get(split, split))
            inputs.append(DatasetInput(dataset=dataset, tags=[tag]))
        self.client.log_inputs(run_id, datasets=inputs)

    def send(self, lines: Iterable[Line]) -> int:
        """Send what the store does not have yet; the number of points sent."""
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
            marks = self.marks[run_id]
            for name, value in values.items():
                key = legal(name)
                if line.step > marks.get(key, -1):
                    marks[key] = line.step
                    points[run_id].append(Metric(key, value, int(line.time * 1000), line.step))
        for run_id, metrics in points.items():
            for i in range(0, len(metrics), BATCH["metrics"]):
                self._batch(run_id, metrics=metrics[i : i + BATCH["metrics"]])
        return sum(map(len, points.values()))

    def _batch(
        self, run_id: str, metrics: Sequence[Metric] = (), params: Sequence[Param] = ()
    ) -> None:
        """``log_batch``; where the store refuses the content, item by item without the bad ones."""
        from mlflow.exceptions import MlflowException

        try:
            self.client.log_batch(run_id, metrics=metrics, params=params)
            return
        except MlflowException as error:
            if error.error_code not in REFUSED:
                raise
            if len(metrics) + len(params) == 1:
                logger.warning("%s: refused: %s", (*metrics, *params)[0].key, error)
                return
        for metric in metrics:
            self._batch(run_id, metrics=[metric])
        for param in params:
            self._batch(run_id, params=[param])

    def upload(self, artifact: Artifact) -> None:
        run_id = self.run_ids[artifact.prompt]
        if not self.target.trusted:
            self._check_place(run_id)
        if artifact.text:
            text = self.target.hide(artifact.path.read_text(encoding="utf-8"))
            self.client.log_text(run_id, text, artifact.path.name)
        else:
            self.client.log_artifact(run_id, str(artifact.path), artifact.folder or None)

    def _check_place(self, run_id: str) -> None:
        """Let a server that is not trusted take files itself, and name no other place for them.

        Raises:
            Refused: it names a folder of this machine, or storage that the person may pay for.
        """
        place = urlsplit(str(self.client.get_run(run_id).info.artifact_uri))
        if place.scheme != "mlflow-artifacts" or place.netloc:
            raise Refused(
                f"{self.target.name} stores files at {redact(place.geturl())}; confirm that it is "
                f"yours: {sync_command(self.folder.path, self.target.name)}"
            )

    def end(self, status: str, results: FinalResults | None, time: float) -> None:
        """Send final results and the run's status.

        Args:
            results: None if the run was killed.
            time: when the run ended, unix seconds.
        """
        if results is not None:
            lines = []
            for name, result in results.prompts.items():
                lines.append(Line(time, result.step, None, name, dict(result.metrics)))
                for key, value in result.tags.items():
                    self.client.set_tag(self.run_ids[name], key, value)
            self.send(lines)
            note = self.target.hide(results.note)
            self.client.set_tag(self.run_ids[None], "mlflow.note.content", note)
        last_first = sorted(self.run_ids.items(), key=lambda item: item[0] is None)
        for _, run_id in last_first:  # the parent last
            self.client.set_terminated(run_id, status, end_time=int(time * 1000))


def _unless_missing(get: Callable[[str], Found], name: str) -> Found | None:
    from mlflow.exceptions import MlflowException

    try:
        return get(name)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return None
