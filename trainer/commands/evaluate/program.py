"""The evaluation of a run on all ranks: rows, arms, base, scores, results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from trainer.commands.answer_files import write_numbers
from trainer.commands.evaluate.arm import Arm
from trainer.commands.evaluate.arms import ArmBuilder
from trainer.commands.evaluate.costs import BaseCost
from trainer.commands.evaluate.options import Options
from trainer.commands.evaluate.results import TaskResults
from trainer.commands.evaluate.rows import RowEncoder
from trainer.commands.evaluate.scoring_pass import BaseOnDemand, Loaded, score_missing
from trainer.commands.evaluate.selection import SelectedRun
from trainer.commands.evaluate.similar_rows import cosine_similar
from trainer.commands.evaluate.store import PredictionStore
from trainer.commands.evaluate.table import show
from trainer.data.task_data import TaskData
from trainer.data.tokenization.chat_template import read_chat_date
from trainer.distributed.deepspeed_engine import Engine, compute_dtype
from trainer.distributed.model_loading import open_base_on_all
from trainer.evaluation.metric_sums import scored_as
from trainer.evaluation.metrics import check_sandbox
from trainer.inference.opened_base import as_trained
from trainer.inference.trained_prompts import load_prompts
from trainer.model.checkpoint_files import BaseFiles
from trainer.model.fingerprint import digest_file
from trainer.model.meta_model import build_meta_model
from trainer.model.weight_adapter import check_layers, load_tensors
from trainer.prompts.saved_prompts import WEIGHTS
from trainer.reporting.evaluation import EVALUATION_FILE, Evaluation, TaskEvaluation
from trainer.reporting.summary import load_summary
from trainer.runtime.console import Console
from trainer.runtime.errors import BadInput
from trainer.runtime.log_folder import measurements_folder
from trainer.training.task_loading import load_tasks_per_node


def evaluate(options: Options, run: SelectedRun, console: Console) -> None:
    """Evaluate the selected prompts, baselines and adapters; a collective.

    Raises:
        BadInput: on all ranks, before the base is loaded.
        Stopped: after a stop signal; the records of complete blocks are kept.
    """
    config = run.config
    engine = Engine(config.engine.timeout_seconds)
    output = measurements_folder(options.run_dir)
    engine.start_watchdog(output / "logs", config.engine.silence_seconds)
    store = PredictionStore(output) if engine.is_main else None
    with engine.held_on_main(None if store is None else store.locked()):
        files = open_base_on_all(engine, config.base, console)
        loaded = engine.run_on_all(lambda: _load(options, run, files, engine.device))
        date = engine.run_on_main(lambda: read_chat_date(options.run_dir))
        with console.phase("reading rows"):
            splits = ("validation", "shifted_validation")
            tasks = load_tasks_per_node(engine, files, config, console, date, splits)
        _warn(engine, options, tasks, console)
        encoder = RowEncoder(
            files.tokenizer,
            files.context_length,
            files.config.vocab_size,
            date,
            files.end_ids,
            console.working,
        )
        builders = _builders(options, run, tasks, encoder, loaded)
        with console.phase("preparing prompts and examples"):
            arms = engine.run_on_all(lambda: _arms(builders))
        cost = engine.run_on_all(lambda: _base_cost(engine, files, run))
        used = as_trained(engine, config, options.run_dir)
        base = BaseOnDemand(engine, files, used, console)
        if options.compares_states:
            # The arms above are checked already: with the rows that BM25 retrieves.
            for builder in builders.values():
                builder.similar = cosine_similar(builder, base, store)
            arms = engine.run_on_all(lambda: _arms(builders))
        score_missing(base, arms, loaded, store, fresh=options.fresh)
        if store is not None:
            _report(options, output, run, arms, store, cost, console)
    engine.close()


def _warn(
    engine: Engine, options: Options, tasks: Mapping[str, TaskData], console: Console
) -> None:
    scored = [scored_as(options.metric or data.task.metric, data.task) for data in tasks.values()]
    warnings = [warning for data in tasks.values() for warning in data.warnings]
    if "execution" in scored and (unsafe := engine.run_on_main(check_sandbox)):
        warnings.append(unsafe)
    for warning in warnings:
        console.warn(warning)


def _load(options: Options, run: SelectedRun, files: BaseFiles, device: torch.device) -> Loaded:
    """Read prompts and adapters, and check that they fit the base."""
    folders = [options.run_dir / "prompts" / prompt.name for prompt in run.prompts]
    folders += [adapter.folder for adapter in run.prompt_adapters]
    prompts = load_prompts(folders, files, device)
    return Loaded(
        prompts,
        [digest_file(folder / WEIGHTS) for folder in folders],
        [(adapter, load_tensors(adapter, device)) for adapter in run.weight_adapters],
        [
            digest_file(adapter.folder / WEIGHTS) + json.dumps(adapter.settings, sort_keys=True)
            for adapter in run.weight_adapters
        ],
    )


def _builders(
    options: Options,
    run: SelectedRun,
    tasks: Mapping[str, TaskData],
    encoder: RowEncoder,
    loaded: Loaded,
) -> dict[str, ArmBuilder]:
    sizes = [prompt.num_virtual_tokens for prompt in loaded.prompts]
    first = len(run.prompts)
    return {
        name: ArmBuilder(
            options,
            run.config,
            data,
            encoder,
            [(i, prompt) for i, prompt in enumerate(run.prompts) if prompt.task == name],
            sizes,
            [(first + i, adapter) for i, adapter in enumerate(run.prompt_adapters)],
            list(enumerate(run.weight_adapters)),
        )
        for name, data in tasks.items()
    }


def _arms(builders: Mapping[str, ArmBuilder]) -> dict[str, list[Arm]]:
    """Build the arms of every task; raises ``BadInput`` with the problems of all tasks."""
    arms, problems = {}, []
    for name, builder in builders.items():
        try:
            arms[name] = builder.build()
        except BadInput as error:
            problems += error.problems
    if problems:
        raise BadInput(problems)
    return arms


def _base_cost(engine: Engine, files: BaseFiles, run: SelectedRun) -> BaseCost:
    """Measure the model on ``meta``, and check that adapters fit its layers."""
    settings = run.config.base
    dtype = compute_dtype(settings.dtype, engine.device)
    model = build_meta_model(files, settings, dtype, engine.device)
    for adapter in run.weight_adapters:
        check_layers(model, adapter)
    return BaseCost.of(model)


def _report(
    options: Options,
    output: Path,
    run: SelectedRun,
    arms: Mapping[str, Sequence[Arm]],
    store: PredictionStore,
    cost: BaseCost,
    console: Console,
) -> None:
    """Write ``evaluation.json`` and print the tables."""
    summary = load_summary(options.run_dir)
    results: dict[str, TaskEvaluation] = {}
    for task, own in arms.items():
        records = {arm.name: store.records(task, arm.name) for arm in own}
        own = [
            replace(arm, setup_seconds=store.setup_seconds(task, arm.name) or arm.setup_seconds)
            for arm in own
        ]
        metric = options.metric or run.config.task(task).metric
        compared = TaskResults(own, records, metric, options.select_on, cost, summary)
        results[task] = compared.evaluation()
    for task, result in results.items():
        show(task, result, console)
    write_numbers(
        Evaluation(tasks=results),
        output,
        EVALUATION_FILE,
        options.json,
        console,
        remark=f"; predictions: {store.folder}",
    )
