"""What an evaluation selects of a run, with all checks that need no base. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.commands.evaluate.early_fit import examples_fit
from trainer.commands.evaluate.options import Options
from trainer.config import DataSource, Prompt, RunConfig, Task, load_output, split_template
from trainer.data.splits import check_rows
from trainer.evaluation.metric_sums import METRICS, metric_problem, package_problem
from trainer.evaluation.pass_at_k import PASS_AT_K, k_of
from trainer.prompts.adapter_files import PromptAdapter, WeightAdapter, read_adapter
from trainer.prompts.saved_prompts import SEGMENT, WEIGHTS
from trainer.reporting.summary import load_summary
from trainer.runtime.errors import BadInput, did_you_mean

#: Temperatures at which answers are sampled; near 0 all of them would be equal.
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 2.0


@dataclass(frozen=True)
class SelectedRun:
    """A run with the tasks, prompts and adapters to evaluate.

    Attributes:
        config: with the selected tasks only; prompts of these tasks, also those not selected.
        prompts: the selected prompts, which are saved.
    """

    config: RunConfig
    prompts: tuple[Prompt, ...]
    prompt_adapters: tuple[PromptAdapter, ...]
    weight_adapters: tuple[WeightAdapter, ...]


def selected_run(options: Options) -> SelectedRun:
    """Select tasks, prompts and adapters, and check them against the options.

    Raises:
        BadInput: with all problems.
    """
    folder = options.run_dir
    config = load_output(folder)
    load_summary(folder)  # refuses one of a newer version
    problems = [
        *_metric_options(options),
        *_unknown("--task", options.tasks, [task.name for task in config.tasks], str(folder)),
        *_unknown("--prompt", options.prompts, [p.name for p in config.prompts], str(folder)),
    ]
    if problems:
        raise BadInput(problems)
    prompts = _prompts(options, config)
    named = {prompt.task for prompt in prompts} if options.prompts else set()
    tasks = [
        _with_data(task, options.data)
        for task in config.tasks
        if (task.name in options.tasks if options.tasks else not named or task.name in named)
    ]
    problems += _problems(options, tasks)
    adapters = []
    for path in options.adapters:
        try:
            adapters.append(read_adapter(path, config.base.model, force=options.force))
        except BadInput as error:
            problems += error.problems
    problems += [
        f"--adapter: {adapter.folder}: its virtual tokens were trained inside text "
        f"({SEGMENT}), and the input of task {task.name!r} has no {{virtual_tokens}}; evaluate it "
        "in the run that trained it"
        for adapter in adapters
        for task in tasks
        if isinstance(adapter, PromptAdapter)
        and adapter.is_inside
        and split_template(task.input) is None
    ]
    if problems:
        raise BadInput(problems)
    names = {task.name for task in tasks}
    config = config.model_copy(
        update={"tasks": tasks, "prompts": [p for p in config.prompts if p.task in names]}
    )
    return SelectedRun(
        config,
        tuple(prompt for prompt in prompts if prompt.task in names),
        tuple(adapter for adapter in adapters if isinstance(adapter, PromptAdapter)),
        tuple(adapter for adapter in adapters if isinstance(adapter, WeightAdapter)),
    )


def check_data(run: SelectedRun, options: Options | None = None) -> list[str]:
    """Read and check all rows; return remarks.

    Args:
        options: those of an evaluation, whose examples in context have to fit.

    Raises:
        BadInput: with all problems.
    """
    if options is None:
        return check_rows(run.config)
    return check_rows(run.config, further=examples_fit(options, run.config))


def _unknown(option: str, names: Sequence[str], known: Sequence[str], folder: str) -> list[str]:
    return [
        f"{option}: {folder} has no {option[2:]} {name!r}{did_you_mean(name, known)}; known: "
        f"{', '.join(known[:20])}"
        for name in names
        if name not in known
    ]


def _prompts(options: Options, config: RunConfig) -> list[Prompt]:
    """Return the prompts to evaluate; raises ``BadInput`` if none is saved."""
    folder = options.run_dir
    saved = [p for p in config.prompts if (folder / "prompts" / p.name / WEIGHTS).is_file()]
    if options.tasks:
        saved = [prompt for prompt in saved if prompt.task in options.tasks]
    if not saved:
        raise BadInput(
            f"{folder}: has no finished prompt; train the run to its end first "
            "(promptshard status shows where it is)"
        )
    if not options.prompts:
        return saved
    unfinished = [name for name in options.prompts if name not in {p.name for p in saved}]
    if unfinished:
        raise BadInput(
            f"--prompt: {', '.join(unfinished)}: not finished, or of a task that is not selected; "
            f"finished here: {', '.join(prompt.name for prompt in saved)}"
        )
    return [prompt for prompt in saved if prompt.name in options.prompts]


def _with_data(task: Task, data: str | None) -> Task:
    if data is None:
        return task
    changes = {
        "validation": [DataSource(path=data)],
        "validation_share": None,
        "max_validation_rows": None,
    }
    return task.model_copy(update=changes)


def _problems(options: Options, tasks: Sequence[Task]) -> list[str]:
    problems = []
    if options.data is not None and len(tasks) > 1:
        names = ", ".join(task.name for task in tasks)
        problems.append(
            f"--data: replaces the rows of one task, but there are {names}; add --prompt"
        )
    for task in tasks:
        if not task.has_validation:
            problems.append(
                f"tasks.{task.name}: has no validation rows to evaluate on; give some with --data"
            )
        metric = options.metric or task.metric
        if reason := metric_problem(metric, task):
            problems.append(f"--metric: {reason} (task {task.name})")
        for option in ("shots", "retrieved", "knn"):
            if getattr(options, option) is not None and (reason := _no_examples(task, option)):
                problems.append(f"--{option}: {reason} (task {task.name})")
        if options.knn is not None and metric not in ("accuracy", "macro_f1"):
            problems.append(
                f"--knn: kNN prompting predicts choices, without likelihoods or text, so {metric} "
                "cannot be computed; use --metric accuracy or macro_f1"
            )
    if missing := package_problem(options.metric or ""):
        problems.append(f"--metric: {missing}")
    return problems


def _metric_options(options: Options) -> list[str]:
    """Return the problems of ``--metric`` and of the options for pass@k alone."""
    problems, metric = [], options.metric
    k = None if metric is None else k_of(metric)
    if metric is not None and k is None and metric not in METRICS:
        hint = (
            "; write a positive number for k, such as pass@10"
            if metric.startswith("pass")
            else did_you_mean(metric, METRICS)
        )
        problems.append(
            f"--metric: {metric!r} is not a metric{hint}; known: {', '.join((*METRICS, PASS_AT_K))}"
        )
    for name in ("n_samples", "temperature"):
        if k is None and getattr(options, name) is not None:
            problems.append(
                f"--{name.replace('_', '-')}: is used with --metric {PASS_AT_K} only, such as "
                "pass@10; add it"
            )
    samples = options.samples
    if k is None or samples is None:
        return problems
    if samples.count < k:
        given = "the default" if options.n_samples is None else "given"
        problems.append(
            f"--n-samples: {samples.count} answers per row ({given}) are fewer than the {k} of "
            f"--metric {metric}; raise it to {k} or more"
        )
    if not MIN_TEMPERATURE <= samples.temperature <= MAX_TEMPERATURE:
        problems.append(
            f"--temperature: {samples.temperature:g} is not from {MIN_TEMPERATURE:g} to "
            f"{MAX_TEMPERATURE:g}; 0.2 suits pass@1, 0.8 larger k. For the one most probable "
            "answer, use --metric execution"
        )
    return problems


def _no_examples(task: Task, option: str) -> str | None:
    """Describe why a task cannot have examples in context, or kNN prompting."""
    if task.tokens is not None or not (task.target or task.messages):
        return "needs rows with a text and an answer, not token ids or texts alone"
    if option == "knn" and not task.scored_by_likelihood:
        return "kNN prompting predicts one of the choices; it needs choices without multi_label"
    return None
