"""Measurements -> ``inspection.json``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from trainer.commands.inspect_prompts.measurements import Measurements
from trainer.commands.inspect_prompts.subjects import INITIAL, OTHER_TASK, RANDOM, Subject
from trainer.evaluation.inspection.elicitation import Description, class_rate
from trainer.evaluation.inspection.embedding_space import (
    VocabularyScan,
    prompt_similarity,
    redundancy,
    token_text,
)
from trainer.evaluation.inspection.leave_one_out import loss_change
from trainer.evaluation.scoring import Scored
from trainer.prompts.soft_prompt import SoftPrompt, VirtualTokens
from trainer.reporting.inspection import (
    CheckpointInspection,
    Control,
    Controls,
    NearestToken,
    ProductToken,
    PromptInspection,
    PrunedPrompt,
    Similarity,
    TokenInspection,
)


def inspect_prompt(
    subject: Subject,
    measured: Measurements,
    pruned: PrunedPrompt | None,
    tokenizer: PreTrainedTokenizerBase,
) -> PromptInspection:
    """Collect all results of one prompt."""
    choices = subject.rows.task.choices
    return PromptInspection(
        task=subject.prompt.task,
        kind="prefix" if subject.is_prefix else "virtual_tokens",
        method=subject.prompt.method,
        rows=len(subject.rows.candidates),
        loss=_loss(measured, ""),
        tokens=_tokens(subject, measured, tokenizer),
        controls=Controls(
            random=_control(RANDOM, subject, measured, tokenizer),
            initial=_control(INITIAL, subject, measured, tokenizer),
            other_task=_control(OTHER_TASK, subject, measured, tokenizer),
        ),
        checkpoints=[
            CheckpointInspection(
                step=step,
                loss=_loss(measured, f"step-{step}"),
                **_elicited(measured.described.get(f"step-{step}"), choices),
            )
            for step, _ in subject.checkpoints
        ],
        pruned=pruned,
        notes=_notes(subject, measured),
        **_elicited(measured.described.get(""), choices),
    )


def similarity(trained: Mapping[str, SoftPrompt]) -> Similarity:
    """Compare all prompts of the bank that have virtual tokens."""
    tokens = {n: p.tensor for n, p in trained.items() if isinstance(p, VirtualTokens)}
    if not tokens:
        return Similarity()
    return Similarity(prompts=list(tokens), cosine=prompt_similarity(list(tokens.values())))


def _notes(subject: Subject, measured: Measurements) -> list[str]:
    notes = list(subject.notes)
    other = subject.controls.get(OTHER_TASK)
    if other is not None and not other.fits:
        notes.append(f"{other.name}, the control of another task, is too long for these rows")
    sensitivity = measured.sensitivity
    if sensitivity is None or sensitivity.attention_LP is None:
        notes.append("attention is not measured: rows of this family are padded, not packed")
    if not (measured.described.get("") or subject.is_prefix):
        notes.append(
            "nothing is elicited: the virtual tokens do not fit into the context with a text, or "
            "the layers of this family read several hidden states of a token"
        )
    if subject.rows.task.choices is None and not subject.is_prefix:
        notes.append(
            "the task has no choices, so no class rate is computed; the elicited text was read "
            "from the middle layer and written to the first one"
        )
    return notes


def _tokens(
    subject: Subject, measured: Measurements, tokenizer: PreTrainedTokenizerBase
) -> list[TokenInspection]:
    count = subject.values.num_virtual_tokens
    columns: list[dict[str, Any]] = [{"index": i} for i in range(count)]
    full = measured.scores[""]
    for column, shorter in zip(columns, measured.without, strict=True):
        column |= _left_out(subject, shorter, full)
    if measured.sensitivity is not None:
        for i, column in enumerate(columns):
            column["gradient_times_input"] = finite(float(measured.sensitivity.gradient_P[i]))
            attention_LP = measured.sensitivity.attention_LP
            if attention_LP is not None:
                column["attention"] = [finite(share) for share in attention_LP[:, i].tolist()]
    if subject.is_prefix:
        _add_prefix_norms(subject, columns)
    else:
        _add_embedding_space(subject, measured, tokenizer, columns)
    return [TokenInspection(**column) for column in columns]


def _left_out(subject: Subject, shorter: Scored, full: Scored) -> dict[str, float | None]:
    if len(subject.rows.candidates) < 2:
        return {}
    assert shorter.nll_R is not None
    assert full.nll_R is not None
    change = loss_change(shorter.nll_R, full.nll_R, subject.rows.label_counts)
    return {
        "leave_one_out": finite(change.difference),
        "leave_one_out_low": finite(change.low),
        "leave_one_out_high": finite(change.high),
    }


def _add_prefix_norms(subject: Subject, columns: Sequence[dict[str, Any]]) -> None:
    """Add the mean norm of each virtual token's keys, and of its values, over layers and heads."""
    norms_PL2A = subject.values.tensor.float().norm(dim=-1)
    for column, norms_P2 in zip(columns, norms_PL2A.mean(dim=(1, 3)).tolist(), strict=True):
        column["key_norm"], column["value_norm"] = norms_P2


def _add_embedding_space(
    subject: Subject,
    measured: Measurements,
    tokenizer: PreTrainedTokenizerBase,
    columns: Sequence[dict[str, Any]],
) -> None:
    scan, values_PH = measured.nearest[""], subject.values.tensor.float()
    start = subject.controls.get(INITIAL)
    for i, (column, norm) in enumerate(zip(columns, values_PH.norm(dim=1).tolist(), strict=True)):
        column["nearest"] = _nearest(scan, i, tokenizer)
        column["nearest_by_inner_product"] = [
            ProductToken(token=token_text(tokenizer, token), inner_product=product)
            for token, product in scan.product[i]
        ]
        column["norm"], column["norm_percentile"] = norm, scan.percentile(norm)
        if start is not None:
            moved = float((values_PH[i] - start.values.tensor[i].float()).norm())
            column["drift"] = moved / scan.mean_norm
    for column, (other, cosine) in zip(columns, redundancy(values_PH), strict=False):
        column["redundancy"], column["redundant_with"] = cosine, other


def _nearest(
    scan: VocabularyScan, i: int, tokenizer: PreTrainedTokenizerBase
) -> list[NearestToken]:
    return [
        NearestToken(token=token_text(tokenizer, token), cosine=cosine)
        for token, cosine in scan.cosine[i]
    ]


def _control(
    name: str, subject: Subject, measured: Measurements, tokenizer: PreTrainedTokenizerBase
) -> Control | None:
    control = subject.controls.get(name)
    if control is None:
        return None
    nearest = []
    if name in measured.nearest:
        scan = measured.nearest[name]
        nearest = [_nearest(scan, i, tokenizer)[0] for i in range(len(scan.cosine))]
    return Control(
        prompt=control.name,
        loss=_loss(measured, name),
        nearest=nearest,
        **_elicited(measured.described.get(name), subject.rows.task.choices),
    )


def _elicited(
    descriptions: Sequence[Description] | None, choices: Sequence[str] | None
) -> dict[str, Any]:
    """Return fields of ``Elicited``: the text with the most class names, the first of several."""
    if not descriptions:
        return {}
    if choices is None:
        sources = sorted({one.layers[0] for one in descriptions})
        middle = sources[len(sources) // 2], min(one.layers[1] for one in descriptions)
        best = next(one for one in descriptions if one.layers == middle and one.with_examples)
        return _best(best)
    rates = [class_rate(one.text, choices) for one in descriptions]
    best = descriptions[rates.index(max(rates))]
    return _best(best) | {"class_rate": max(rates), "mean_class_rate": sum(rates) / len(rates)}


def _best(one: Description) -> dict[str, Any]:
    return {"elicited": one.text, "layers": one.layers, "with_examples": one.with_examples}


def _loss(measured: Measurements, name: str) -> float | None:
    scored = measured.scores.get(name)
    return None if scored is None else finite(scored.scores["loss"])


def finite(value: float) -> float | None:
    """Return None for NaN and infinity, which JSON has not."""
    return value if math.isfinite(value) else None
