"""Scores the baselines before the first step, and rows without predictions after the last."""

from __future__ import annotations

from collections.abc import Sequence

from trainer.evaluation.baselines import VALIDATION, baselines_of, score_baselines
from trainer.evaluation.scoring import Request, Scored
from trainer.training.validation import Validator


def score_missing_baselines(validator: Validator) -> None:
    """Score the base without and with hand-written prompts, unless a checkpoint has the scores."""
    progress, evaluator = validator.progress, validator.evaluator
    if progress.baselines:
        return

    def score(requests: Sequence[Request]) -> list[Scored]:
        results = validator.score("scoring baselines", requests, evaluator.teachers)
        if evaluator.reused:
            validator.console.print(
                f"baselines: {evaluator.reused} of {len(requests)} read from the cache: an earlier "
                "run scored the same rows with the same base"
            )
        return results

    teachers = {prompt.name: prompt.teacher for prompt in validator.config.prompts}
    progress.baselines = score_baselines(validator.tasks, teachers, score, validator.predictions)


def complete_predictions(validator: Validator) -> None:
    """Score rows again whose predictions are missing or not from the best step.

    Predictions can be missing after a run was resumed in a copied folder, from a checkpoint older
    than the predictions, or from a version that kept none.
    """
    bank, engine = validator.bank, validator.engine
    baselines = {b.file: b for b in baselines_of(validator.tasks) if VALIDATION in b.rows}
    expected = dict.fromkeys(baselines, 0)
    for name, rule in validator.stopping.items():
        if rule.best_step is not None:
            expected[name] = rule.best_step
    predictions = validator.predictions
    missing = [] if predictions is None else predictions.missing(expected)
    missing = engine.all_gather(missing)[0]  # rank 0's
    if not missing:
        return
    requests = [
        baselines[name].request(VALIDATION, first=len(bank))
        if name in baselines
        else validator.request(bank.names.index(name), VALIDATION)
        for name in missing
    ]
    tokens = [bank.best(k).to(engine.device) for k in range(len(bank))]
    tokens += validator.evaluator.teachers
    results = validator.score("scoring rows again for predictions", requests, tokens)
    for name, request, scored in zip(missing, requests, results, strict=True):
        validator.keep_predictions(name, expected[name], request.rows, scored)
