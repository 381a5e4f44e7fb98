"""Print the scores of a validation: one line per prompt, or one line per task of a sweep."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from statistics import median

from trainer.config import LOWER_IS_BETTER, Prompt, RunConfig
from trainer.config.ranking import Entry, rank
from trainer.data.task_data import TaskData
from trainer.evaluation.score_format import column_title, describe, format_score, shown_scores
from trainer.runtime.console import Console
from trainer.training.progress import Scores

#: A task with at least this many prompts has one line per validation, and no line per prompt of the
#: initialization search.
SWEEP = 3
#: Names in a line; the others are only counted.
NAMES = 4


class ValidationReport:
    """Prints the scores of validations; with ``Console.verbose``, those of every prompt."""

    def __init__(self, config: RunConfig, tasks: Mapping[str, TaskData], console: Console) -> None:
        self._config, self._tasks, self._console = config, tasks, console

    def show(
        self,
        step: int,
        scores: Mapping[int, Scores],
        training: Collection[int],
        stopped_early: Mapping[int, int],
    ) -> None:
        """Print the scores of the prompts that were validated.

        Args:
            scores: by index of the prompt; empty if the prompt's task has no validation.
            training: prompts that continue to train.
            stopped_early: best step of each prompt that early stopping has just stopped.
        """
        for group in self._groups():
            scored = {k: scores[k] for k in group if scores.get(k)}
            stopped = {self._prompt(k).name: stopped_early[k] for k in scored if k in stopped_early}
            if not scored:
                continue
            if len(group) < SWEEP or self._console.verbose:
                for k in scored:
                    self._print(step, self._prompt(k).name, self._described(k, scores[k]))
                for name, best in stopped.items():
                    self._print(step, name, f"stopped early, best at step {best}")
                continue
            left = len([k for k in group if k in training])
            text = f"{self._summary(scored)}; {left} of {len(group)} still train"
            self._print(step, self._prompt(group[0]).task, text)
            if stopped:
                names = [f"{name} (best at step {best})" for name, best in stopped.items()]
                text = f"{len(stopped)} stopped early: {some(names)}"
                self._print(step, self._prompt(group[0]).task, text)

    def show_halving(
        self, step: int, task: str, kept: Sequence[int], stopped: Mapping[int, Scores]
    ) -> None:
        """Print the prompts that a rung keeps, and with ``Console.verbose`` those it stops.

        Args:
            kept: from best to worst.
        """
        names = [self._prompt(k).name for k in kept]
        text = f"halving keeps {len(kept)} of {len(kept) + len(stopped)} prompts: "
        text += ", ".join(names) if self._console.verbose else some(names)
        if self._console.verbose:
            metric = f"validation_{self._tasks[task].task.metric}"
            text += "; stops " + ", ".join(
                f"{self._prompt(k).name} ({format_score(metric, scores.get(metric))})"
                for k, scores in stopped.items()
            )
        self._print(step, task, text)

    def _groups(self) -> list[list[int]]:
        """Prompts whose scores are comparable: of one task, and losses only of one teacher."""
        groups: dict[tuple[str, str | None], list[int]] = {}
        for k, prompt in enumerate(self._config.prompts):
            by_loss = self._tasks[prompt.task].task.metric in LOWER_IS_BETTER
            groups.setdefault((prompt.task, self._teacher(k) if by_loss else None), []).append(k)
        return list(groups.values())

    def _summary(self, scores: Mapping[int, Scores]) -> str:
        """Best finite score of a group of prompts with the prompt's name, median and worst."""
        metric = self._tasks[self._prompt(next(iter(scores))).task].task.metric
        key = f"validation_{metric}"
        entries = [
            Entry(
                name=str(k),
                scores=own,
                num_virtual_tokens=self._prompt(k).num_virtual_tokens,
                teacher=self._teacher(k),
            )
            for k, own in scores.items()
        ]
        ranked = rank(entries, metric)
        not_finite = len(entries) - len(ranked)
        if not ranked:
            return f"no finite score of {not_finite} prompts"
        values = [entry.scores[key] for entry in ranked]
        best = self._prompt(int(ranked[0].name))
        column = next(iter(shown_scores({key: 0.0}, _is_distilled(best))))
        first, middle, last = (
            format_score(key, x) for x in (values[0], median(values), values[-1])
        )
        text = f"{column_title(column)} best {first} ({best.name}), median {middle}, worst {last}"
        return f"{text}; {not_finite} not finite" if not_finite else text

    def _described(self, k: int, scores: Scores) -> str:
        """Scores of one prompt with their 95% intervals."""
        data = self._tasks[self._prompt(k).task]
        num_rows = {split: len(rows.candidates) for split, rows in data.evaluation.items()}
        shown = shown_scores(scores, _is_distilled(self._prompt(k)))
        return describe(shown, data.task.metric, num_rows)

    def _prompt(self, k: int) -> Prompt:
        return self._config.prompts[k]

    def _teacher(self, k: int) -> str | None:
        prompt = self._prompt(k)
        return (prompt.teacher or prompt.name) if _is_distilled(prompt) else None

    def _print(self, step: int, name: str, text: str) -> None:
        self._console.paragraph(f"step {step}  {name}: {text}", indent=len(f"step {step}  "))


def some(names: Sequence[str]) -> str:
    """Return the first ``NAMES`` names and the number of others."""
    more = len(names) - NAMES
    return ", ".join(names) if more <= 0 else f"{', '.join(names[:NAMES])} and {more} more"


def _is_distilled(prompt: Prompt) -> bool:
    return prompt.objective == "distill"
