"""``inspection.json``: the typed results of ``promptshard inspect RUN_DIR``. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from trainer.reporting.summary import Float
from trainer.runtime.errors import BadInput
from trainer.runtime.json_file import read_json_object

INSPECTION_FILE = "inspection.json"
#: Increase when a key is removed or changes its meaning.
SCHEMA_VERSION = 1
#: Decimals of the numbers of a column.
FEWEST_DECIMALS, MOST_DECIMALS = 4, 8
WAYWARDNESS = (
    "Nearest tokens can be arbitrary: a prompt that performs as well can be trained to have almost "
    "any nearest tokens (Khashabi et al. 2022, arXiv 2112.08348). Compare them with the controls "
    "before you read a meaning into them."
)


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow")


class NearestToken(_Model):
    """A token of the vocabulary and the cosine of its embedding with a virtual token."""

    token: str
    cosine: Float


class ProductToken(_Model):
    """A token of the vocabulary and the inner product of its embedding with a virtual token."""

    token: str
    inner_product: Float


class TokenInspection(_Model):
    """Measurements of one virtual token. None: has no meaning for this prompt, or is not known.

    Attributes:
        index: place in the prompt, from 0.
        nearest, nearest_by_inner_product: the most similar tokens, best first.
        norm: of the virtual token; of a prefix: root mean square of keys and values.
        norm_percentile: share of the vocabulary with a smaller norm, from 0 to 100.
        key_norm, value_norm: of a prefix: mean norm over layers and heads.
        drift: Euclidean distance from the initial value, in multiples of the vocabulary's mean
            norm.
        redundancy: largest cosine with another virtual token of the prompt.
        redundant_with: index of that token.
        leave_one_out: change of the validation loss without this token, with 95% interval, paired
            by row. Positive: the token helps.
        attention: share of attention that the positions that predict the answer give to this token,
            mean over heads, by layer; None for a layer without attention.
        gradient_times_input: sum of gradient times value, of the mean validation loss.
    """

    index: int
    nearest: list[NearestToken] = []
    nearest_by_inner_product: list[ProductToken] = []
    norm: float | None = None
    norm_percentile: float | None = None
    key_norm: float | None = None
    value_norm: float | None = None
    drift: float | None = None
    redundancy: float | None = None
    redundant_with: int | None = None
    leave_one_out: float | None = None
    leave_one_out_low: float | None = None
    leave_one_out_high: float | None = None
    attention: list[float | None] | None = None
    gradient_times_input: float | None = None

    @property
    def half_interval(self) -> float | None:
        """Half of the 95% interval of ``leave_one_out``."""
        if self.leave_one_out is None or self.leave_one_out_high is None:
            return None
        return self.leave_one_out_high - self.leave_one_out


class Elicited(_Model):
    """Text that InSPEcT elicits from a prompt (Ramati et al. 2024, arXiv 2410.11660).

    Attributes:
        elicited: the text with the most class names among all pairs of layers, with and without
            examples.
        class_rate: share of the task's class names in that text; None: the task has no classes.
        mean_class_rate: mean over all texts.
        layers: layer whose input is read, and layer whose input is replaced, of that text.
        with_examples: that text continues descriptions of other tasks.
    """

    elicited: str | None = None
    class_rate: float | None = None
    mean_class_rate: float | None = None
    layers: tuple[int, int] | None = None
    with_examples: bool | None = None


class Control(Elicited):
    """The same measurements of a prompt that did not learn the task.

    Attributes:
        prompt: the other prompt, for the control of another task.
        loss: on the same rows.
        nearest: the most similar token of every virtual token.
    """

    prompt: str | None = None
    loss: float | None = None
    nearest: list[NearestToken] = []


class Controls(_Model):
    """Controls of a prompt; None: there is none, and ``notes`` of the prompt has the reason.

    Attributes:
        random: random directions with the norms of the prompt.
        initial: the prompt before training.
        other_task: a prompt of another task in the same run.
    """

    random: Control | None = None
    initial: Control | None = None
    other_task: Control | None = None


class CheckpointInspection(Elicited):
    """What is elicited from a prompt at a checkpoint, and its loss on the same rows."""

    step: int
    loss: float | None = None


class PrunedPrompt(_Model):
    """Result of ``--prune``.

    Attributes:
        dropped: indices of the virtual tokens that were dropped.
        num_virtual_tokens: those that remain.
        rows: number of rows of the scores, other than the ``chosen_on`` rows on which the dropped
            tokens were chosen.
        loss_before, loss: of the full and of the shorter prompt on these rows.
        difference: of the losses, with 95% interval, paired by row.
        adapter: folder of the shorter adapter; None: nothing was dropped.
    """

    dropped: list[int]
    num_virtual_tokens: int
    rows: int
    chosen_on: int
    loss_before: Float
    loss: Float
    difference: Float
    difference_low: Float
    difference_high: Float
    metric: str | None = None
    score_before: float | None = None
    score: float | None = None
    adapter: str | None = None

    @property
    def advice(self) -> str:
        """Whether the shorter prompt can replace the full one, in a sentence."""
        if self.difference_low > 0:
            return "The shorter prompt is significantly worse there: keep the full one."
        return "No significant loss there; more rows can show a smaller one."


class PromptInspection(Elicited):
    """All measurements of one prompt.

    Attributes:
        kind: ``virtual_tokens`` or ``prefix`` (keys and values).
        rows: number of validation rows.
        loss: on these rows.
        checkpoints: the oldest first.
        notes: what was not measured, and why.
    """

    task: str
    kind: str = "virtual_tokens"
    method: str = ""
    rows: int = 0
    loss: float | None = None
    tokens: list[TokenInspection]
    controls: Controls = Controls()
    checkpoints: list[CheckpointInspection] = []
    pruned: PrunedPrompt | None = None
    notes: list[str] = []


class Similarity(_Model):
    """Cosines between the mean virtual tokens of prompts (Vu et al. 2022, arXiv 2110.07904).

    Attributes:
        prompts: names; prefixes are left out.
        cosine: a symmetric matrix.
    """

    prompts: list[str] = []
    cosine: list[list[Float]] = []


class Inspection(_Model):
    """Content of ``inspection.json``."""

    schema_version: int = SCHEMA_VERSION
    prompts: dict[str, PromptInspection]
    similarity: Similarity = Similarity()
    remark: str = WAYWARDNESS


def load_inspection(output_dir: Path) -> Inspection | None:
    """Read ``inspection.json``; None if it is missing, damaged or of a newer version."""
    try:
        inspection = Inspection.model_validate(read_json_object(output_dir / INSPECTION_FILE))
    except (BadInput, ValidationError):
        return None
    return inspection if inspection.schema_version <= SCHEMA_VERSION else None


def losses_without(tokens: Sequence[TokenInspection]) -> list[str | None]:
    """Format ``leave_one_out`` of every token, ``+0.00157 ±0.00053``; None if it is not known."""
    halves = [half for token in tokens if (half := token.half_interval)]
    places = decimals([token.leave_one_out for token in tokens], min(halves, default=1.0))
    texts: list[str | None] = []
    for token in tokens:
        change, half = token.leave_one_out, token.half_interval
        interval = "" if half is None else f" ±{half:.{places}f}"
        texts.append(None if change is None else f"{change:+z.{places}f}{interval}")
    return texts


def decimals(values: Sequence[float | None], smallest: float = 1.0) -> int:
    """Decimals that give the largest value of a column four digits, and ``smallest`` one."""
    largest = max((abs(value) for value in values if value is not None), default=0.0)
    if not (0 < largest < math.inf and smallest > 0):
        return FEWEST_DECIMALS
    wanted = max(3 - math.floor(math.log10(largest)), -math.floor(math.log10(smallest)))
    return min(MOST_DECIMALS, max(FEWEST_DECIMALS, wanted))
