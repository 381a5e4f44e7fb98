"""``evaluation.json``: the typed results of ``promptshard evaluate``, and their tables.

The terminal, the HTML report and the MLflow note render ``titles`` and ``cells``, so their numbers
are the same. Imports no torch.
"""

from __future__ import annotations

import math
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from trainer.evaluation import score_format
from trainer.evaluation.lint.results import Effect
from trainer.evaluation.metric_sums import LOWER_IS_BETTER
from trainer.evaluation.pass_at_k import k_of
from trainer.runtime.errors import BadInput
from trainer.runtime.json_file import read_json_object

EVALUATION_FILE = "evaluation.json"
#: Increase when a key is removed or changes its meaning.
SCHEMA_VERSION = 1
NONE = "–"


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow")


class ArmResult(_Model):
    """Result of one arm on the reported rows.

    Attributes:
        low, high: 95% interval of the score.
        difference: to the best trained prompt, paired by row, with its 95% interval.
        loss: mean negative log-likelihood of the answer, in nats per token.
        ece, brier: calibration of the predicted choice.
        bytes: size of texts, index or weights, without the base.
        setup_seconds: time to prepare the arm without training.
        training_seconds: of a trained prompt: an equal share of its run.
        paid_after_queries: queries after which training the best prompt costs fewer FLOPs than this
            arm.
    """

    name: str
    kind: str
    text: str | None = None
    score: float | None
    low: float | None
    high: float | None
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    p_value: float | None = None
    test: str | None = None
    loss: float | None = None
    ece: float | None = None
    brier: float | None = None
    tokens_per_query: float
    flops_per_query: float
    bytes: int
    setup_seconds: float = 0.0
    training_seconds: float | None = None
    paid_after_queries: float | None = None


class ChangeResult(_Model):
    """Score of an arm on other rows than the validation rows, or on changed validation rows.

    Attributes:
        change: ``shifted_validation``, or how the rows were changed.
        difference: to the score on the validation rows; paired by row unless the rows differ.
    """

    arm: str
    change: str
    rows: int
    score: float | None
    low: float | None
    high: float | None
    difference: float | None
    difference_low: float | None
    difference_high: float | None
    p_value: float | None


class TaskEvaluation(_Model):
    """Results of one task.

    Attributes:
        rows: number of reported rows.
        detectable_difference: difference from the best trained prompt to the best other arm that
            this number of rows shows with 80% power.
        best: the best trained prompt.
        selected_on: rows on which the best of several prompts and texts was chosen: ``all`` (also
            those that are reported) or ``half`` (others than those that are reported).
        n_samples, temperature: of pass@k: sampled answers per row, and how.
    """

    rows: int
    metric: str
    detectable_difference: float | None
    best: str | None
    best_hand_written: str | None = None
    selected_on: str = "all"
    n_samples: int | None = None
    temperature: float | None = None
    arms: list[ArmResult]
    robustness: list[ChangeResult] = []


class Evaluation(_Model):
    """Content of ``evaluation.json``."""

    schema_version: int = SCHEMA_VERSION
    tasks: dict[str, TaskEvaluation]


CHANGES_REMARK = (
    "difference: to the score of the same prompt on the validation rows, with 95% interval; paired "
    "by row except for shifted validation."
)
METRIC_TITLES = {"rouge_l": "ROUGE-L", "bleu": "BLEU", "chrf": "chrF"}
#: Columns that a narrow terminal leaves out, the first one first.
OPTIONAL = ("Brier", "set-up", "bytes", "ECE", "FLOPs", "paid after", "tokens", "p")


def titles(task: TaskEvaluation) -> list[str]:
    """Return the columns of a task's table, without the names of the arms."""
    calibrated = any(arm.ece is not None for arm in task.arms)
    paid = any(arm.paid_after_queries is not None for arm in task.arms)
    return [
        METRIC_TITLES.get(task.metric, task.metric.replace("_", " ").replace("f1", "F1")),
        "difference",
        "p",
        *(["ECE", "Brier"] if calibrated else []),
        "tokens",
        "FLOPs",
        "bytes",
        "set-up",
        *(["paid after"] if paid else []),
    ]


def cells(task: TaskEvaluation, arm: ArmResult) -> list[str]:
    """Format the results of an arm, in the order of ``titles``."""
    metric = task.metric
    score = format_value(metric, arm.score) + _interval(metric, arm.low, arm.high)
    difference, p_value = NONE, NONE
    if arm.difference is not None:
        difference = format_difference(metric, arm.difference)
        difference += _interval(metric, arm.difference_low, arm.difference_high)
        p_value = _p_value(arm.p_value)
    values = {
        "difference": difference,
        "p": p_value,
        "ECE": NONE if arm.ece is None else f"{arm.ece:.3f}",
        "Brier": NONE if arm.brier is None else f"{arm.brier:.3f}",
        "tokens": f"{arm.tokens_per_query:,.0f}",
        "FLOPs": _short(arm.flops_per_query),
        "bytes": _short(arm.bytes),
        "set-up": _seconds(arm.setup_seconds + (arm.training_seconds or 0)),
        "paid after": NONE if arm.paid_after_queries is None else _short(arm.paid_after_queries),
    }
    return [score, *(values[title] for title in titles(task)[1:])]


def label(task: TaskEvaluation, arm: ArmResult) -> str:
    """Name of an arm in the table; the best trained prompt has a star."""
    text = f"{arm.name}: “{' '.join(arm.text.split())}”" if arm.text else arm.name
    if arm.kind == "adapter":
        text = f"{arm.name} (adapter)"
    return f"{'*' if arm.name == task.best else ' '} {text}"


def by_rank(task: TaskEvaluation, top: int) -> tuple[list[ArmResult], list[ArmResult]]:
    """Divide the arms, in their order: all but the trained prompts below ``top``, and these.

    Of equal scores, the lower loss ranks first.
    """
    sign = -1 if task.metric in LOWER_IS_BETTER else 1

    def rank(arm: ArmResult) -> tuple[float, float]:
        loss = math.inf if arm.loss is None else arm.loss
        return math.inf if arm.score is None else -sign * arm.score, loss

    trained = [arm for arm in task.arms if arm.kind in ("prompt", "prompt_retrieved")]
    last = sorted(trained, key=rank)[top:] if len(trained) > top + 2 else []
    return [arm for arm in task.arms if arm not in last], [a for a in task.arms if a in last]


def remarks(task: TaskEvaluation) -> list[str]:
    """Return how to read the table of a task, in sentences."""
    lines = []
    if task.n_samples is not None:
        lines.append(
            f"{task.metric}: the probability that {_answers(k_of(task.metric))} passes all tests "
            f"of its row, estimated from {task.n_samples} answers per row at "
            f"temperature {task.temperature:g}."
        )
    prompts = [arm for arm in task.arms if arm.kind == "prompt"]
    texts = [arm for arm in task.arms if arm.kind == "hand_written"]
    if task.best is not None:
        unit = "" if task.metric in LOWER_IS_BETTER else "in points, "
        lines.append(
            f"difference: to {task.best}, the best trained prompt (*), {unit}paired by row, with "
            "95% interval; p-values are not corrected for the number of arms."
        )
    if len(prompts) > 1 or len(texts) > 1:
        if task.selected_on == "half":
            chosen = [task.best] if len(prompts) > 1 else []
            chosen += [task.best_hand_written] if len(texts) > 1 else []
            verb = "was" if len(chosen) == 1 else "were"
            names = " and ".join(map(str, chosen))
            lines.append(f"{names} {verb} chosen on the other half of the rows.")
        else:
            lines.append(
                "The best of several prompts and texts was chosen on these same rows, so its score "
                "is optimistic; --select-on half chooses on other rows."
            )
    if task.detectable_difference is not None:
        if task.detectable_difference > 1 and task.metric not in LOWER_IS_BETTER:
            lines.append(f"{task.rows:,} rows are too few to show any difference.")
        else:
            amount = format_difference(task.metric, task.detectable_difference).lstrip("+")
            amount += "" if task.metric in LOWER_IS_BETTER else " points"
            lines.append(
                f"A difference of {amount} between {task.best} and the best other arm would be "
                f"significant on {task.rows:,} rows with 80% power."
            )
    if any(arm.paid_after_queries is not None for arm in task.arms):
        lines.append(
            f"paid after: number of queries after which training {task.best} has paid for itself "
            "in FLOPs, because this arm reads more per query."
        )
    return lines


def _answers(k: int | None) -> str:
    return "an answer" if k == 1 else f"at least one of {k} answers"


def format_value(metric: str, value: float | None) -> str:
    """Format a score: a loss or perplexity as a number, any other in percent."""
    if metric == "perplexity" and value is not None and math.isfinite(value):
        return f"{value:.2f}"
    return score_format.format_score(metric, value)


def format_difference(metric: str, value: float) -> str:
    """Format a difference: ``+5.0`` points, or ``-0.1234`` nats of a loss."""
    if metric == "perplexity":
        return f"{value:+z.2f}"
    return score_format.format_difference(metric, value)


def effect_text(metric: str, effect: Effect | None) -> str:
    """Format the measured effect of a rewrite: ``+2.1 (0.3 to 3.9)``."""
    if effect is None or effect.difference is None:
        return NONE
    text = format_difference(metric, effect.difference)
    return text + _interval(metric, effect.low, effect.high)


def _interval(metric: str, low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return ""
    first, second = (format_value(metric, value).rstrip("%") for value in (low, high))
    return f" ({first} to {second})"


def _p_value(value: float | None) -> str:
    if value is None:
        return NONE
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _short(value: float) -> str:
    """Format a number with three digits and the prefix of its power of 1000: ``1.2 G``."""
    for factor, unit in ((1e15, " P"), (1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= factor:
            return f"{value / factor:.3g}{unit}"
    return f"{value:.0f}"


def _seconds(value: float) -> str:
    return NONE if value == 0 else f"{value:.1f} s" if value < 100 else f"{value:,.0f} s"


def changes(task: TaskEvaluation) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows of the table of robustness: one row per arm and change."""
    columns = ["rows", "score", "difference", "p"]
    table = []
    for result in task.robustness:
        difference = NONE
        if result.difference is not None:
            difference = format_difference(task.metric, result.difference)
            difference += _interval(task.metric, result.difference_low, result.difference_high)
        table.append(
            [
                f"{result.arm}, {result.change.replace('_', ' ')}",
                f"{result.rows:,}",
                format_value(task.metric, result.score)
                + _interval(task.metric, result.low, result.high),
                difference,
                _p_value(result.p_value),
            ]
        )
    return columns, table


def load_evaluation(output_dir: Path) -> Evaluation | None:
    """Read ``evaluation.json``; None if it is missing, damaged or of a newer version."""
    try:
        evaluation = Evaluation.model_validate(read_json_object(output_dir / EVALUATION_FILE))
    except (BadInput, ValidationError):
        return None
    return evaluation if evaluation.schema_version <= SCHEMA_VERSION else None
