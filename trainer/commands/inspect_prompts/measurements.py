"""Measure all subjects together: losses, attention and gradients, nearest tokens, elicitation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trainer.commands.inspect_prompts.subjects import Subject
from trainer.evaluation.evaluator import Evaluator
from trainer.evaluation.inspection.elicitation import (
    DEMONSTRATIONS,
    Description,
    decoder_layers,
    elicit,
    num_texts,
)
from trainer.evaluation.inspection.embedding_space import (
    VocabularyScan,
    scan_vocabulary,
    vocabulary_ids,
)
from trainer.evaluation.inspection.sensitivity import Sensitivity, measure_sensitivity
from trainer.evaluation.scoring import Request, Scored
from trainer.prompts.soft_prompt import SoftPrompt, VirtualTokens
from trainer.runtime.console import Console

#: Nearest tokens of a virtual token.
NEAREST = 5


@dataclass
class Measurements:
    """Measurements of one subject.

    Attributes:
        scores: of the prompt (""), its controls and checkpoints, by name; a control that does not
            fit into the context is missing.
        without: scores of the prompt without each virtual token.
        nearest: of the prompt and its controls; empty for a prefix.
        described: of the prompt, its controls and checkpoints; empty for a prefix.
    """

    scores: dict[str, Scored] = field(default_factory=dict)
    without: list[Scored] = field(default_factory=list)
    sensitivity: Sensitivity | None = None
    nearest: dict[str, VocabularyScan] = field(default_factory=dict)
    described: dict[str, list[Description]] = field(default_factory=dict)


def measure(
    evaluator: Evaluator,
    subjects: Sequence[Subject],
    embed: Callable[[Sequence[int]], Tensor],
    demonstrations: Sequence[str],
    context_length: int,
    console: Console,
) -> list[Measurements]:
    """Measure everything; a collective. All virtual tokens are left out in one pass."""
    results = [Measurements() for _ in subjects]
    _score(evaluator, subjects, results, console)
    values = [subject.values for subject in subjects]
    requests = [Request(subject.rows, k) for k, subject in enumerate(subjects)]
    total = sum(len(subject.rows.candidates) for subject in subjects)
    with console.phase("measuring attention and gradients", total, "texts") as phase:
        for result, sensitivity in zip(
            results, measure_sensitivity(evaluator, requests, values, phase.advance), strict=True
        ):
            result.sensitivity = sensitivity
    _find_nearest(evaluator, subjects, results, embed, console)
    _elicit(evaluator, subjects, results, demonstrations, context_length, console)
    return results


def _score(
    evaluator: Evaluator,
    subjects: Sequence[Subject],
    results: Sequence[Measurements],
    console: Console,
) -> None:
    bank: list[SoftPrompt] = []
    requests: list[Request] = []
    places: list[tuple[int, str | None]] = []

    def add(subject: int, values: SoftPrompt | None, name: str | None) -> None:
        requests.append(Request(subjects[subject].rows, None if values is None else len(bank)))
        places.append((subject, name))
        if values is not None:
            bank.append(values)

    for i, subject in enumerate(subjects):
        for name, values in subject.variants():
            if name not in subject.controls or subject.controls[name].fits:
                add(i, values, name)
        for shorter in subject.shorter():
            add(i, shorter, None)
    texts = evaluator.num_texts(requests)
    with console.phase("leaving out each virtual token", texts, "texts") as phase:
        scored = evaluator.score(requests, bank, phase.advance)
    for (i, variant), score in zip(places, scored, strict=True):
        if variant is None:
            results[i].without.append(score)
        else:
            results[i].scores[variant] = score


def _find_nearest(
    evaluator: Evaluator,
    subjects: Sequence[Subject],
    results: Sequence[Measurements],
    embed: Callable[[Sequence[int]], Tensor],
    console: Console,
) -> None:
    """Scan the vocabulary once for the virtual tokens of all prompts and controls."""
    compared = [
        (i, name, values.tensor)
        for i, subject in enumerate(subjects)
        for name, values in subject.variants()
        if not subject.is_prefix and (not name or name in subject.controls)
    ]
    if not compared:
        return
    ids = vocabulary_ids(evaluator.tokenizer, evaluator.base.vocab_size)
    vectors_NH = torch.cat([tensor_PH for _, _, tensor_PH in compared])
    with console.phase("reading the vocabulary", len(ids), "tokens") as phase:
        scan = scan_vocabulary(embed, ids, vectors_NH, NEAREST, phase.advance)
    evaluator.engine.end_step()
    start = 0
    for i, name, tensor_PH in compared:
        part = slice(start, start + len(tensor_PH))
        nearest = VocabularyScan(scan.norms_V, scan.cosine[part], scan.product[part])
        results[i].nearest[name] = nearest
        start = part.stop


def _elicit(
    evaluator: Evaluator,
    subjects: Sequence[Subject],
    results: Sequence[Measurements],
    demonstrations: Sequence[str],
    context_length: int,
    console: Console,
) -> None:
    variants = [
        (i, name, values)
        for i, subject in enumerate(subjects)
        for name, values in subject.variants()
        if isinstance(values, VirtualTokens)
    ]
    if not variants:
        return
    examples = [subjects[i].rows.candidates[0][0] for i, _, _ in variants]
    texts = num_texts(len(variants), len(decoder_layers(evaluator.base)))
    with console.phase("eliciting descriptions", texts, "texts") as phase:
        described = elicit(
            evaluator,
            [values for _, _, values in variants],
            examples,
            demonstrations or DEMONSTRATIONS,
            context_length,
            phase.advance,
        )
    for (i, name, _), descriptions in zip(variants, described, strict=True):
        results[i].described[name] = descriptions
