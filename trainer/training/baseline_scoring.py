"""Scores baselines before the first step; after the last, train rows and missing predictions."""

from __future__ import annotations

from collections.abc import Sequence

from trainer.config.ranking import Entry
from trainer.evaluation.baselines import VALIDATION, baselines_of, score_baselines
from trainer.evaluation.prediction_files import train_file
from trainer.evaluation.scoring import Request, Scored
from trainer.evaluation.selection import best_and_other_length
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


def score_train_rows(validator: Validator) -> None:
    """Score each task's best prompt, and one of another length, on a sample of the train rows.

    Their predictions show how well they fit the rows that they were trained on.
    """
    bank, requests = validator.bank, []
    for name in [name for task in validator.tasks for name in _compared(validator, task)]:
        k = bank.names.index(name)
        prompt = validator.config.prompts[k]
        data = validator.tasks[prompt.task]
        if prompt.placement in data.train_samples:
            rows = data.train_samples[prompt.placement]
            requests.append(Request(rows, k, data.teachers.get(name)))
    tokens = [bank.best(k).to(validator.engine.device) for k in range(len(bank))]
    results = validator.score("scoring train rows", requests, tokens)
    for request, scored in zip(requests, results, strict=True):
        assert request.prompt is not None
        name = bank.names[request.prompt]
        step = validator.stopping[name].best_step or 0
        validator.keep_predictions(train_file(name), step, request.rows, scored)


def _compared(validator: Validator, task: str) -> list[str]:
    """Names of a task's best prompt and of the prompt that ``best_and_other_length`` returns."""
    data, progress, entries = validator.tasks[task], validator.progress, []
    for prompt in validator.config.prompts:
        if prompt.task != task:
            continue
        reason = progress.stopped.get(prompt.name, {}).get("reason")
        teacher = prompt.teacher or prompt.name
        entry = Entry(
            name=prompt.name,
            scores=progress.scores.get(prompt.name, {}),
            num_virtual_tokens=prompt.num_virtual_tokens,
            teacher=teacher if prompt.objective == "distill" else None,
            eliminated=reason == "halving",
            diverged=reason == "diverged",
        )
        entries.append(entry)
    rows = data.evaluation.get(VALIDATION)
    num_rows = None if rows is None else len(rows.candidates)
    compared = best_and_other_length(entries, data.task.metric, num_rows)
    return [entry.name for entry in compared or () if entry is not None]
