"""One run, from a checked run file to its results.

run file -> base files, tasks -> tokens -> sharded base -> bank -> loop -> adapters, summary, report
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainer.checkpointing.async_writer import AsyncCheckpointWriter
from trainer.checkpointing.checkpoint import SavedCheckpoint
from trainer.checkpointing.checkpoint_callback import CheckpointCallback
from trainer.checkpointing.checkpoint_names import CHECKPOINTS
from trainer.checkpointing.output_folder import (
    OutputFolder,
    archive_earlier_run,
    results_can_be_written_later,
    was_archived,
)
from trainer.checkpointing.resume import (
    check_finished_run,
    choice_conditions,
    find_checkpoint,
    load_base_as_saved,
    load_run_state,
    run_identity,
    saved_positions,
    take_run_snapshot,
)
from trainer.checkpointing.run_lock import Lock, acquire
from trainer.config import RunConfig
from trainer.data.prompt_positions import texts_before, with_positions
from trainer.data.task_data import TaskData
from trainer.data.tokenization.chat_template import keep_chat_date, read_chat_date, reads_date
from trainer.distributed.deepspeed_engine import Engine, compute_dtype, device_name
from trainer.distributed.model_loading import (
    LoadedBase,
    fingerprint_base_on_all,
    open_base_on_all,
)
from trainer.distributed.prefetch import RankInfo, StepPrefetcher
from trainer.evaluation.baseline_cache import BaselineCache
from trainer.evaluation.evaluator import Evaluator
from trainer.evaluation.prediction_records import Predictions
from trainer.model.checkpoint_files import BaseFiles
from trainer.model.families import check_prefix_tuning, embedding_size
from trainer.packing.batch_source import BatchSource
from trainer.prompts.initial_prompts import save_initial
from trainer.prompts.peft_adapter import FixedText
from trainer.prompts.saved_prompts import check_sources, without_sources
from trainer.prompts.soft_prompt import VirtualTokens
from trainer.reporting.html import write_missing_report
from trainer.reporting.planned import PlanComparison, as_summary, node_sizes, plan_of_run
from trainer.reporting.run_description import describe_run, measure
from trainer.reporting.run_end import finish_sending, tracked_run
from trainer.reporting.run_results import write_results
from trainer.reporting.summary import RunSummary, finished_summary
from trainer.reporting.terminal_table import show_results
from trainer.runtime import process, stop_signals
from trainer.runtime.console import Console
from trainer.runtime.phases import PHASES, PhaseTimes
from trainer.runtime.stop_signals import Stopped
from trainer.tracking import MetricsLog, TrackingClient
from trainer.tracking.metrics_callback import MetricsCallback
from trainer.tracking.tensorboard_callback import TensorBoardCallback, check_tensorboard
from trainer.training.callbacks import Callback, ConsoleProgress
from trainer.training.init_scoring import LossInitScorer
from trainer.training.initial_bank import copy_rank_0, embedding_function, make_bank
from trainer.training.loop import Loop
from trainer.training.profiler import Profiler
from trainer.training.task_loading import read_tasks

#: Rows of each task whose lengths are used to estimate the memory of packed batches.
SAMPLE = 1000


def train(config: RunConfig, console: Console, *, fresh: bool, command: str) -> None:
    """Train all prompts of a run, or resume it from the newest checkpoint of its output folder.

    Raises:
        BadInput: on all ranks together, if settings or files are invalid.
        Stopped: after a rank received a stop signal and the state of the last step was saved.
    """
    times = PhaseTimes()
    times.add(dict.fromkeys(PHASES, 0.0) | {"start": process.seconds_since_start()})
    with times("start"), console.phase("connecting ranks"):
        engine = Engine(config.engine.timeout_seconds)
    engine.start_watchdog(Path(config.output_dir) / "logs", config.engine.silence_seconds)
    try:
        with _locked(engine, Path(config.output_dir), console) as lock:
            _train(engine, config, console, lock, times, fresh=fresh, command=command)
    except Stopped:
        engine.any_rank(False)  # a barrier: the launcher ends all ranks once one exits
        raise
    engine.wait_for_main()
    engine.close()


def _train(
    engine: Engine,
    config: RunConfig,
    console: Console,
    lock: Lock | None,
    times: PhaseTimes,
    *,
    fresh: bool,
    command: str,
) -> None:
    """Train a run; ``lock`` of the output folder is None on ranks other than 0."""
    output = Path(config.output_dir)
    if config.tracking.tensorboard:
        engine.run_on_all(check_tensorboard)
    with times("data"), console.phase("reading config and tokenizer"):
        files = open_base_on_all(engine, config.base, console)
    if any(prompt.entry.trains_prefix for prompt in config.prompts):
        engine.run_on_all(lambda: check_prefix_tuning(files.config, files.name))
    # A requeued job has already moved the earlier run; the folder contains the job's own files.
    fresh = fresh and not engine.run_on_main(lambda: was_archived(output))
    date = engine.run_on_main(lambda: _chat_date(files, config, output, fresh=fresh))
    places = engine.run_on_main(lambda: {} if fresh else saved_positions(output, config))
    config = engine.run_on_all(lambda: with_positions(config, files.tokenizer, date, places))
    with times("data"), console.phase("reading rows"):
        tasks = read_tasks(engine, files, config, console, date)
    with times("loading the base"), console.phase("checking the base's files"):
        identity = _identity(engine, files, config, console, tasks, date)
    saved = engine.run_on_main(
        lambda: None if fresh else find_checkpoint(output, identity, console)
    )
    if saved is None:
        engine.run_on_all(lambda: check_sources(config, embedding_size(files.config)))
    finished = None if fresh else engine.run_on_main(lambda: finished_summary(output))
    if finished is not None:
        if saved is None:
            engine.run_on_main(lambda: check_finished_run(output, config, identity))
        _show_finished_run(finished, config, console, is_main=lock is not None)
        return

    with times("loading the base"), console.phase("loading the base"):
        conditions = choice_conditions(config, device_name(engine.device), engine.world_size)
        lengths = [n for data in tasks.values() for n in data.train.lengths[:SAMPLE].tolist()]
        loaded = load_base_as_saved(engine, files, config, console, lengths, saved, conditions)
    before = texts_before(config, files.tokenizer, date)
    loop = _make_loop(engine, config, console, files, loaded, tasks, identity, saved, times, before)
    fixed_texts = _fixed_texts(engine, config, files, loaded, tasks, console, before)
    if fresh:  # all checks have passed
        engine.run_on_main(lambda: archive_earlier_run(output, console))
    if saved is None and loop.predictions is not None:
        loop.predictions.clear()
    stop_signals.defer()
    if lock is None:
        loop.run()
        measure(engine, loop, loaded)
        return

    def describe(*, begins: bool = False) -> None:
        describe_run(output, config, engine, loaded, tasks, command, begins=begins)
        if date:
            keep_chat_date(output, date)

    log = MetricsLog(output)
    log.rewind(loop.progress.step, validated=not loop.progress.unjudged)
    describe(begins=saved is None)
    if saved is None:
        bank = loop.bank
        save_initial(output, {name: bank.snapshot(i) for i, name in enumerate(bank.names)})
    writer = AsyncCheckpointWriter(
        output / CHECKPOINTS, config.checkpoint.keep, console.warn, lock.confirm
    )
    client = TrackingClient(output, config.tracking.uri)
    checkpoints = CheckpointCallback(
        writer,
        lock,
        OutputFolder(output, log, lock, describe),
        lambda: take_run_snapshot(loop, loaded, identity, conditions),
        console.warn,
    )
    loop.callbacks += [MetricsCallback(log, client, console.warn), checkpoints]
    plan = plan_of_run(config, files, tasks, loaded, engine.device, node_sizes(engine.world_size))
    if plan is not None and saved is None:  # the plan is of a whole run
        loop.callbacks.append(PlanComparison(plan, console))
    if config.tracking.tensorboard:
        from torch.utils.tensorboard import SummaryWriter  # needs an optional package

        loop.callbacks.append(TensorBoardCallback(output, SummaryWriter, console.warn))
    with tracked_run(output, client, console):
        seconds_before = loop.progress.train_seconds
        with times("saving"), writer, times("training"):  # ``writer`` finishes pending checkpoints
            loop.run()
        checkpoints.check_folder(now=True)
        measured = measure(engine, loop, loaded)
        measured["checkpoints"] = writer.report(loop.progress.train_seconds - seconds_before)
        if plan is not None:
            measured["planned"] = as_summary(plan)
        with times("results"), results_can_be_written_later(output):
            lock.confirm()
            digest = str(identity["base.model, its weights"])
            summary = write_results(
                *(output, loop, files, measured, console, fixed_texts), base_digest=digest
            )
        show_results(summary, config, console)


def _identity(
    engine: Engine,
    files: BaseFiles,
    config: RunConfig,
    console: Console,
    tasks: Mapping[str, TaskData],
    date: datetime.date | None,
) -> dict[str, Any]:
    """Return settings and digests that a run must share with its checkpoint; a collective."""
    dtype = str(compute_dtype(config.base.dtype, engine.device)).removeprefix("torch.")
    fingerprint = fingerprint_base_on_all(engine, files, console)
    identity = run_identity(config, fingerprint, dtype, tasks)
    return identity | ({"date of the chat template": date.isoformat()} if date else {})


def _show_finished_run(
    summary: RunSummary, config: RunConfig, console: Console, *, is_main: bool
) -> None:
    """Print the results of a finished run; write a missing report and send unsent metrics."""
    output = Path(config.output_dir)
    console.print(f"{output} already holds this finished run; use --fresh to train again")
    if is_main:
        write_missing_report(output, console.warn)
    show_results(summary, config, console)
    if is_main:
        client = TrackingClient(output, config.tracking.uri)
        if client.has_unsent():
            client.start()
        finish_sending(client, console)


def _make_loop(
    engine: Engine,
    config: RunConfig,
    console: Console,
    files: BaseFiles,
    loaded: LoadedBase,
    tasks: Mapping[str, TaskData],
    identity: Mapping[str, Any],
    saved: SavedCheckpoint | None,
    times: PhaseTimes,
    before: Mapping[str, Sequence[int]],
) -> Loop:
    """Build the evaluator, the bank and the loop, and load the state of a checkpoint.

    Args:
        before: ``texts_before``.
    """
    output = Path(config.output_dir)
    embed = embedding_function(loaded.model, engine.device)
    teachers = {t.index: t.token_ids for data in tasks.values() for t in data.teachers.values()}
    evaluator = Evaluator(
        engine,
        loaded.model,
        files.tokenizer,
        loaded.budget,
        [VirtualTokens(embed(ids), ids) for _, ids in sorted(teachers.items())],
        _baseline_cache(engine, files, identity, loaded),
    )
    with times("initialization search"):
        # When resuming, the checkpoint's state overwrites all initial values.
        scorer = None if saved else LossInitScorer(config, tasks, evaluator, console, before)
        initial = without_sources(config) if saved else config
        bank = make_bank(initial, engine, loaded.model, files, scorer, console.warn, before)
    rank = RankInfo(engine.rank, engine.world_size, engine.device)
    callbacks: list[Callback] = [ConsoleProgress(console, config.last_step)]
    if config.engine.profile is not None:
        logs = output / "logs"
        callbacks.append(
            Profiler(config.engine.profile, logs, engine.rank, engine.device, console.warn)
        )
    loop = Loop(
        config,
        engine,
        evaluator,
        tasks,
        bank,
        StepPrefetcher(BatchSource(config, tasks), rank),
        console,
        callbacks,
        Predictions(output, console.warn) if engine.is_main else None,
        times=times,
    )
    if saved is None:
        copy_rank_0(engine, bank)
    else:
        load_run_state(loop, saved)
        console.print(f"resuming from step {loop.progress.step}/{config.last_step}")
    return loop


def _fixed_texts(
    engine: Engine,
    config: RunConfig,
    files: BaseFiles,
    loaded: LoadedBase,
    tasks: Mapping[str, TaskData],
    console: Console,
    before: Mapping[str, Sequence[int]],
) -> dict[str, FixedText | None]:
    """Return the text that is in a prompt's segment in all rows, by prompt; a collective.

    None: the text before the virtual tokens differs between rows.

    Args:
        before: ``texts_before``.
    """
    embed = embedding_function(loaded.model, engine.device)
    texts: dict[str, FixedText | None] = {
        name: FixedText(tuple(ids), len(ids), None, (str(files.tokenizer.decode(ids)), ""))
        for name, ids in before.items()
    }
    for prompt in config.prompts:
        if prompt.entry.trains_prefix:
            continue
        leading = tasks[prompt.task].train_at(prompt.placement).leading
        if leading is None:
            texts[prompt.name] = None
        elif leading.input_ids:
            ids, at = leading.input_ids, leading.prompt_at
            first, rest = (files.tokenizer.decode(list(part)) for part in (ids[:at], ids[at:]))
            texts[prompt.name] = FixedText(ids, at, embed(ids).cpu(), (str(first), str(rest)))
    inside = [name for name, text in texts.items() if text is None]
    if inside:
        console.warn(
            f"{len(inside)} prompt(s) stand after text that differs between rows, where PEFT "
            "cannot put them; their adapters have the virtual tokens only, and the model cards "
            f"describe how to use them: {', '.join(inside[:8])}{', ...' if inside[8:] else ''}"
        )
    return texts


def _baseline_cache(
    engine: Engine, files: BaseFiles, identity: Mapping[str, Any], loaded: LoadedBase
) -> BaselineCache:
    """Return the cache of baselines for this base, matrix product, device and attention."""
    base = {key: value for key, value in identity.items() if key.startswith("base.")}
    how = {"matmul": loaded.matmul, "device": engine.device.type, "flex": loaded.model.flex}
    return BaselineCache(base | how, files.num_bytes)


@contextmanager
def _locked(engine: Engine, output: Path, console: Console) -> Iterator[Lock | None]:
    """Hold the lock of the output folder on rank 0; None on other ranks."""
    lock = engine.run_on_all(lambda: acquire(output, console.print) if engine.is_main else None)
    try:
        yield lock
    finally:
        if lock is not None:
            lock.release()


def _chat_date(
    files: BaseFiles, config: RunConfig, output: Path, *, fresh: bool
) -> datetime.date | None:
    """Return the date of the run's first start, if its tasks use a chat template with a date."""
    if not reads_date(files.tokenizer) or not any(task.is_chat for task in config.tasks):
        return None
    kept = None if fresh else read_chat_date(output)
    return kept or datetime.date.today()
