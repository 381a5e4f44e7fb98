"""Read the status of a run from its output folder and from Slurm.

Nothing is written, so it also works during the run, from any machine that has access to the folder.
Files may be damaged or untrusted: each is parsed into a model, or counts as missing.
"""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Iterator
from pathlib import Path

from launch import preflight
from launch.run_metrics import QUICK_TAIL_BYTES, TAIL_BYTES, RunMetrics
from launch.run_state import PromptStatus, Status, holder_process, judge, launcher_runs
from launch.slurm_queue import JobState, find_job, query_jobs, read_record, resolved, state_of
from trainer.checkpointing.checkpoint_names import checkpoint_names
from trainer.checkpointing.run_lock import LOCK, lock_state
from trainer.config import RunConfig, check_path, load
from trainer.config.ranking import LAST, rank, score_key
from trainer.reporting.summary import RunSummary, load_summary
from trainer.runtime.errors import BadInput

#: Seconds between two queries of Slurm about one job; its controller serves the whole cluster.
SLURM_INTERVAL = 20.0


class StatusReader:
    """Reads the status of one run again and again; metrics are read incrementally."""

    def __init__(self, run_dir: Path, jobs: dict[str, JobState] | None = None) -> None:
        """``jobs`` replaces the queries of the default cluster: all its queued jobs by ID."""
        self.run_dir = run_dir
        self._jobs = jobs
        self._metrics: dict[Path, RunMetrics] = {}
        self._recorded = ""  # output_dir of the run file, which differs in a moved or copied folder
        self._asked: dict[tuple[str, str], tuple[float, dict[str, JobState]]] = {}

    def read(self, *, quick: bool = False) -> Status:
        """Read the folder and query Slurm for the job last submitted for it.

        Raises:
            BadInput: the folder is missing, not readable, or not an output folder.
        """
        preflight.check_folder(str(self.run_dir))
        try:
            return self._read(quick)
        except OSError as error:
            where = error.filename or self.run_dir
            raise BadInput(
                f"{where}: cannot be read ({error.strerror}); check its permissions and its file "
                "system"
            ) from None

    def _read(self, quick: bool) -> Status:
        record, folder = read_record(self.run_dir)
        here = resolved(self.run_dir)
        if len(record.tasks) > 1 and here not in map(resolved, record.tasks):
            description = f"job array {record.job}, {len(record.tasks)} tasks"
            status = Status(str(self.run_dir), "array", description)
            jobs = self._query(record.job, record.cluster)
            for i, task in enumerate(record.tasks):
                state = state_of(f"{record.job}_{i}", jobs)
                status.tasks.append(self._task(Path(task), state, quick))
            return status
        number, submission = find_job(self.run_dir, record)
        job = state_of(number, self._query(number, submission.cluster)) if number else None
        status = self._run(self.run_dir, job, folder / "run.yaml", quick)
        if status.resume and submission.command:
            status.resume = _without_fresh(submission.command)
        if status.resume and here not in [*map(resolved, submission.tasks), self._recorded]:
            status.resume += f" {shlex.quote(f'output_dir={here}')}"  # was moved or copied
        return status

    def _query(self, number: str, cluster: str) -> dict[str, JobState]:
        """Return the states of a job or of an array's tasks, or the last known if Slurm fails."""
        if self._jobs is not None and not cluster:
            return self._jobs
        asked, jobs = self._asked.get((number, cluster), (-math.inf, {}))
        if time.monotonic() - asked > SLURM_INTERVAL:
            answer = query_jobs(number, cluster)
            if answer is not None:
                jobs = answer
                self._asked[number, cluster] = (time.monotonic(), jobs)
        return jobs

    def _task(self, run_dir: Path, job: JobState, quick: bool) -> Status:
        """Return the status of one array task; a damaged folder must not hide the other tasks."""
        try:
            check_path(str(run_dir))
            return self._run(run_dir, job, None, quick)
        except (ValueError, OSError) as error:
            return Status(str(run_dir), "unknown", str(error))

    def _run(self, run_dir: Path, job: JobState | None, frozen: Path | None, quick: bool) -> Status:
        status = Status(str(run_dir), job=job)
        summary, lock = load_summary(run_dir), lock_state(run_dir / LOCK)
        config = None
        if not (quick and summary and _is_complete(summary)):
            config = _config(run_dir, frozen, expected=job is not None or lock is not None)
        self._recorded = resolved(config.output_dir if config else run_dir)
        status.steps = config.last_step if config else summary.steps if summary else None
        metrics = self._metrics.setdefault(run_dir, RunMetrics(run_dir))
        if config or not quick:
            metrics.update(QUICK_TAIL_BYTES if quick else TAIL_BYTES)
        status.step, status.written = metrics.step, metrics.written
        status.metrics = metrics.latest
        if config is None and summary and summary.steps:
            status.step = summary.steps
        steps = (int(name.rpartition("-")[2]) for name in checkpoint_names(run_dir))
        status.checkpoint = max(steps, default=None)
        for name, result in summary.prompts.items() if summary else ():
            status.stopped[name] = result.stopped.reason if result.stopped else "finished"
        status.process = holder_process(lock)
        judge(status, summary, lock)
        if status.state == "running" and lock is not None and lock.dead is None:
            status.tokens_per_second = metrics.tokens_per_second
            left = (status.steps or 0) - status.step
            if (pace := metrics.seconds_per_step) is not None and left > 0:
                status.eta_seconds = pace * left
        if config is not None:
            status.prompts = _prompts(config, metrics, summary)
        elif summary is not None:
            status.prompts = _prompts_of_summary(summary)
        return status


def _without_fresh(command: str) -> str:
    """Remove the option from a command that would start the run over."""
    try:
        return shlex.join(word for word in shlex.split(command) if word != "--fresh")
    except ValueError:  # a damaged record
        return command


def read_status(run_dir: Path) -> Status:
    """Read the status of a run once; see ``StatusReader.read``."""
    return StatusReader(run_dir).read()


def _config(run_dir: Path, frozen: Path | None, *, expected: bool) -> RunConfig | None:
    """Load the run file that the run has saved or, before it has started, the submitted one."""
    for path in (run_dir / "run.yaml", frozen):
        if path is not None and path.is_file():
            return load(path)
    if expected or (run_dir / "logs" / "rank-0.log").exists() or launcher_runs(run_dir):
        return None
    return preflight.check_result(str(run_dir))


def _prompts(
    config: RunConfig, metrics: RunMetrics, summary: RunSummary | None
) -> list[PromptStatus]:
    """Return the progress of every prompt, in the order of the run file."""
    prompts = []
    for prompt in config.prompts:
        latest = metrics.latest.get(prompt.name, {})
        loss_step, loss = latest.get("train_loss", (0, math.nan))
        scored = metrics.validations.get(prompt.name, {})
        item = PromptStatus(
            name=prompt.name,
            task=prompt.task,
            metric=config.task(prompt.task).metric,
            num_virtual_tokens=prompt.num_virtual_tokens,
            step=max([loss_step, *scored]),
            steps=config.prompt_steps(prompt),
            train_loss=loss if math.isfinite(loss) else None,
            teacher=(prompt.teacher or prompt.name) if prompt.objective == "distill" else None,
        )
        keys = {step: score_key(scores, item.metric) for step, scores in scored.items()}
        best = min(keys, key=lambda step: (keys[step], step), default=None)
        if best is not None and keys[best] != LAST:
            item.best, item.best_step = scored[best], best
        if summary and (result := summary.prompts.get(prompt.name)):
            item.stopped = result.stopped.reason if result.stopped else "finished"
            item.best, item.best_step = result.scores, result.best_step
        elif item.step < min(metrics.step - 1, item.steps):
            item.stopped = "stopped early"
        prompts.append(item)
    return prompts


def _prompts_of_summary(summary: RunSummary) -> list[PromptStatus]:
    """Return the prompts of a finished run without reading its run file."""
    metrics = {task: selected.metric for task, selected in summary.selected.items()}
    return [
        PromptStatus(
            name=name,
            task=result.task or "",
            metric=metrics.get(result.task or "") or "",
            num_virtual_tokens=result.num_virtual_tokens or 0,
            step=(result.stopped.step if result.stopped else None) or summary.steps or 0,
            steps=summary.steps or 0,
            best=result.scores,
            best_step=result.best_step,
            stopped=result.stopped.reason if result.stopped else "finished",
            teacher=name if result.objective == "distill" else None,
        )
        for name, result in summary.prompts.items()
    ]


def _is_complete(summary: RunSummary) -> bool:
    """Whether a summary has all that a list of runs shows; older versions lack the metric."""
    ranked = summary.selected and all(selected.metric for selected in summary.selected.values())
    return bool(summary.status == "finished" and summary.steps and ranked)


def ranked_prompts(status: Status) -> list[PromptStatus]:
    """Return all prompts, from best to worst in each task, then those without a score."""
    ranked = [prompt for prompts in _by_task(status) for prompt in prompts]
    names = {prompt.name for prompt in ranked}
    return [*ranked, *(prompt for prompt in status.prompts if prompt.name not in names)]


def best_prompts(status: Status) -> list[PromptStatus]:
    """Return the best prompt of each task, without tasks that have no score yet."""
    return [prompts[0] for prompts in _by_task(status) if prompts]


def _by_task(status: Status) -> Iterator[list[PromptStatus]]:
    """Yield the ranked prompts of every task."""
    for task in dict.fromkeys(prompt.task for prompt in status.prompts):
        prompts = {prompt.name: prompt for prompt in status.prompts if prompt.task == task}
        metric = next(iter(prompts.values())).metric
        yield [prompts[e.name] for e in rank([p.entry for p in prompts.values()], metric)]
