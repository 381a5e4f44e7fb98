"""``summary.json``: the typed, versioned results of a run. Imports no torch.

    write_results -> RunSummary -> summary.json -> report, terminal table, MLflow, status

Keys that a newer version adds are kept and ignored.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from trainer.evaluation.score_format import PREFIXES
from trainer.runtime import atomic_io
from trainer.runtime.errors import BadInput
from trainer.runtime.json_file import read_json_object

SUMMARY_FILE = "summary.json"
#: Increase when a key is removed or changes its meaning. Version 0: files without a version.
SCHEMA_VERSION = 1
#: A number that is null in the file if it is not finite; then it is read as NaN.
Float = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow")


class Scores(_Model):
    """Results with scores as additional keys: ``validation_loss``, ``validation_accuracy``, ...

    ``shifted_validation_`` scores are on out-of-distribution rows. The key of a standard error ends
    with ``_standard_error``.
    """

    @property
    def scores(self) -> dict[str, float]:
        scores: dict[str, float] = {}
        for key, value in (self.model_extra or {}).items():
            if isinstance(value, int | float):
                scores[key] = value
            elif value is None and key.startswith(PREFIXES):
                scores[key] = math.nan  # null in the file
        return scores


class Stop(_Model):
    """When and why a prompt's training ended: finished, early_stopping, halving or diverged."""

    step: int | None = None
    reason: str = "finished"


class PromptResult(Scores):
    """Result of one prompt at its best step."""

    task: str | None = None
    method: str | None = None
    objective: str | None = None
    num_virtual_tokens: int | None = None
    best_step: int | None = None
    skipped_updates: int = 0
    stopped: Stop | None = None


class Baseline(Scores):
    """Scores of a baseline, with the fields of its kind.

    Attributes:
        text: hand-written prompt, or text of a teacher.
        prompts: distilled prompts that learn from the teacher.
        train_share: share of the train rows with that answer.
    """

    text: str | None = None
    prompts: list[str] = []
    answer: str | None = None
    train_share: float | None = None


class Comparison(_Model):
    """Paired comparison of a task's best prompt with its best baseline.

    Attributes:
        difference: prompt minus baseline, in the task's metric; ``low`` and ``high`` are its 95%
            interval.
        detectable_difference: smallest difference that the test detects with about 80% power.
    """

    baseline: str
    prompt: str
    rows: int
    difference: Float
    low: Float
    high: Float
    p_value: Float
    test: str
    detectable_difference: Float
    better: bool
    also_better: list[str] = []


class TaskResult(_Model):
    """Baselines of one task.

    Attributes:
        untaught: for each distilled prompt, the base model without a prompt compared with that
            prompt's teacher.
        teachers: the teachers' texts scored as prompts.
        rows: scored rows of each split.
    """

    no_prompt: Baseline | None = None
    hand_written: list[Baseline] = []
    majority: Baseline | None = None
    untaught: dict[str, Baseline] = {}
    teachers: list[Baseline] = []
    rows: dict[str, int] = {}
    comparison: Comparison | None = None


class RowCounts(_Model):
    """Rows of one split: all, skipped or truncated as too long, and also in the train rows."""

    rows: int | None = None
    skipped: int = 0
    truncated: int = 0
    also_in_train: int = 0


class ShorterPrompt(_Model):
    """A shorter prompt within one standard error of the best one."""

    prompt: str
    score: Float
    num_virtual_tokens: int


class Selection(_Model):
    """The best prompt of a task."""

    prompt: str
    metric: str = ""
    score: float | None = None
    num_virtual_tokens: int | None = None
    why: str = ""
    shorter: ShorterPrompt | None = None


class Change(_Model):
    """Difference of two scores, with its 95% interval and a p-value."""

    difference: Float
    low: Float
    high: Float
    p_value: Float
    test: str


class TrainScore(_Model):
    """Score of a prompt on a sample of the train rows.

    Attributes:
        metric: the task's, or ``loss`` if the task's needs generated text.
        gap: score on the validation rows minus that on the train rows.
    """

    metric: str
    rows: int
    score: Float
    gap: Change | None = None


class SeedSpread(_Model):
    """Scores of prompts that differ in their seeds only.

    Attributes:
        prompt: the best one of them; of several groups of such prompts, the group with the best.
        standard_deviation: between seeds, pooled over the groups.
    """

    prompt: str
    seeds: int
    low: Float
    high: Float
    standard_deviation: Float


class Overfitting(_Model):
    """Signs of overfitting of a task's best prompt.

    Attributes:
        other: prompt of another length: the shortest one within one standard error, else the best.
        length, length_on_train: score of ``prompt`` minus that of ``other``, paired by row, on
            validation rows and on train rows.
        shift: score on the shifted validation rows minus that on the validation rows.
        baseline_shift: the same of the best baseline.
        take: the prompt to use: ``prompt``, or a shorter one within one standard error.
        verdict: the above in words, in sentences.
    """

    prompt: str
    train: TrainScore | None = None
    other: str | None = None
    length: Change | None = None
    length_on_train: Change | None = None
    shift: Change | None = None
    baseline_shift: Change | None = None
    seeds: SeedSpread | None = None
    take: str
    verdict: list[str] = []


class Throughput(_Model):
    """Speed of all ranks together.

    Attributes:
        cpu_seconds_per_step: of the process that uses the most, without its first step, which
            compiles. Other programs on the machine disturb them less than ``train_seconds``.
    """

    useful_tokens_per_second: float | None = None
    useful_tokens: int | None = None
    train_seconds: float | None = None
    data_wait_share: float | None = None
    cpu_seconds_per_step: float | None = None


class Memory(_Model):
    """Memory in bytes, the largest value of all ranks, and settings that depend on memory."""

    base_bytes_per_rank: int | None = None
    kept_bytes_per_rank: int | None = None
    ranks_per_copy: int | None = None
    peak_rss_bytes: int | None = None
    peak_gpu_bytes: int | None = None
    saved_bytes_per_token: float | None = None
    saved_bytes_per_token_and_layer: float | None = None
    stream_tokens: int | None = None
    gradient_checkpointing: bool | None = None


class Communication(_Model):
    gathered_bytes_per_step: float | None = None
    exchanged_bytes_per_step: float | None = None


class Planned(_Model):
    """What the cost model expected, computed before the first step; see ``trainer.cost_model``.

    Attributes:
        seconds: of the run, validation and initialization search included.
        peak_bytes: of a GPU's memory, or of a process on a CPU.
        saved_bytes: from forward to backward of the longest packed batch.
    """

    seconds: Float
    step_seconds: Float
    useful_tokens_per_second: Float
    base_bytes_per_rank: int
    peak_bytes: int
    saved_bytes: int
    gathered_bytes_per_step: Float
    flops_per_step: Float
    load_seconds: Float


class Load(_Model):
    seconds: float | None = None
    bytes_read_per_rank: int | None = None


class RunSummary(_Model):
    """Results of a run that has finished or failed.

    Attributes:
        prompts, tasks, selected: by name of the prompt or task.
        data: row counts by task and split.
        overfitting: by task.
        planned: None if the cost model does not describe the run.
        time: seconds by phase, over all starts of the run.
        rank_seconds: the same seconds, times the number of ranks of each start.
    """

    schema_version: int = 0
    status: Literal["finished", "failed"]
    error: str | None = None
    steps: int | None = None
    prompts: dict[str, PromptResult] = {}
    tasks: dict[str, TaskResult] = {}
    data: dict[str, dict[str, RowCounts]] = {}
    throughput: Throughput = Throughput()
    memory: Memory = Memory()
    communication: Communication = Communication()
    load: Load = Load()
    planned: Planned | None = None
    time: dict[str, Float] = {}
    rank_seconds: float | None = None
    versions: dict[str, str] = {}
    world_size: int | None = None
    checkpoints: dict[str, object] = {}
    selected: dict[str, Selection] = {}
    overfitting: dict[str, Overfitting] = {}


def save_summary(output_dir: Path, summary: RunSummary) -> None:
    """Write ``summary.json``: the fields that were set, with the current schema version."""
    values = {"schema_version": SCHEMA_VERSION} | summary.model_dump(exclude_unset=True)
    atomic_io.write_json(output_dir / SUMMARY_FILE, values)


def load_summary(output_dir: Path) -> RunSummary | None:
    """Read ``summary.json``; None if it is missing or damaged.

    Raises:
        BadInput: a newer version wrote the file.
    """
    path = output_dir / SUMMARY_FILE
    try:
        values = read_json_object(path)
        version = values.get("schema_version", 0)
        if not isinstance(version, int) or version <= SCHEMA_VERSION:
            return RunSummary.model_validate(values)
    except (BadInput, ValidationError):
        return None
    raise BadInput(
        f"{path}: schema_version {version} is newer than {SCHEMA_VERSION}, the newest that this "
        "version of promptshard reads; use the version that wrote the file"
    )


def finished_summary(output_dir: Path) -> RunSummary | None:
    """As ``load_summary``, but also None if the run did not finish.

    A run whose summary is damaged resumes from its last checkpoint and writes the file again.
    """
    summary = load_summary(output_dir)
    if summary is None or summary.status != "finished" or summary.steps is None:
        return None
    return summary if summary.prompts else None
