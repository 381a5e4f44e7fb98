"""A run, from a checked run file to results: wires the parts in the order of the data.

run file -> base files, tasks -> tokens -> sharded base -> bank -> loop -> adapters, summary, report
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer.checkpointing.async_writer import AsyncCheckpointWriter
from trainer.checkpointing.checkpoint import SavedCheckpoint
from trainer.checkpointing.checkpoint_names import CHECKPOINTS
from trainer.checkpointing.output_folder import (
    OutputFolder,
    archive_earlier_run,
    results_can_be_written_later,
    was_archived,
)
from trainer.checkpointing.resume import (
    apply_choices,
    choice_conditions,
    find_checkpoint,
    run_identity,
    saved_choices,
    take_run_snapshot,
)
from trainer.checkpointing.run_lock import Lock, LockLost, acquire
from trainer.checkpointing.state_tensors import join_tensors
from trainer.config import RunConfig
from trainer.data.task_data import TaskData, load_tasks
from trainer.data.tokenization.chat_date import keep_chat_date, read_chat_date
from trainer.data.tokenization.chat_template import reads_date
from trainer.distributed.deepspeed_engine import Engine, compute_dtype
from trainer.distributed.model_loading import (
    LoadedBase,
    fingerprint_base_on_all,
    load_base,
    open_base_on_all,
)
from trainer.distributed.prefetch import RankInfo, StepPrefetcher
from trainer.evaluation.baseline_cache import BaselineCache
from trainer.evaluation.evaluator import Evaluator
from trainer.evaluation.generation import keys_and_values
from trainer.evaluation.metrics import check_sandbox
from trainer.evaluation.prediction_records import Predictions
from trainer.evaluation.stop_criteria import StopCriteria, check_targets
from trainer.model.checkpoint_files import BaseFiles
from trainer.model.families import check_prefix_tuning, embedding_size
from trainer.model.prompted_model import PromptedBase
from trainer.packing.batch_source import BatchSource
from trainer.prompts.bank import Bank
from trainer.prompts.saved_prompts import check_sources, without_sources
from trainer.prompts.soft_prompt import VirtualTokens
from trainer.reporting.html import write_missing_report
from trainer.reporting.run_description import describe_run, device_name, measure
from trainer.reporting.run_results import write_results
from trainer.reporting.summary import SUMMARY_FILE, RunSummary, finished_summary, save_summary
from trainer.reporting.terminal_table import show_results
from trainer.runtime import process, stop_signals
from trainer.runtime.console import Console
from trainer.runtime.errors import BadInput
from trainer.runtime.phase_times import PhaseTimes
from trainer.runtime.process import ROWS_CHECKED
from trainer.runtime.redact import redact
from trainer.runtime.stop_signals import Stopped
from trainer.tracking import MetricsLog, TrackingClient, unless_full
from trainer.training.init_scoring import LossInitScorer
from trainer.training.loop import Loop
from trainer.training.prompt_optimizer import make_optimizer

#: How long the end of a run waits for the tracker: a file on a busy machine is only slow, a server
#: may be down.
LOCAL_STORE_SECONDS, SERVER_SECONDS, FAILED_SECONDS = 90.0, 20.0, 3.0

#: Rows of each task whose lengths tell how much packed batches will take.
SAMPLE = 1000


def train(config: RunConfig, console: Console, *, fresh: bool, command: str) -> None:
    """Train all prompts of a run, or resume it from the newest checkpoint of its output folder.

    Raises:
        BadInput: invalid settings or files, on all ranks together.
        Stopped: a rank received a stop signal, and the state of the last step is saved.
    """
    times = PhaseTimes()
    times.add({"start": process.process_age()})
    with times("start"), console.phase("connecting ranks"):
        engine = Engine(config.engine.timeout_seconds)
    engine.start_watchdog(Path(config.output_dir) / "logs", config.engine.silence_seconds)
    try:
        with _locked(engine, Path(config.output_dir), console) as lock:
            _train(engine, config, console, lock, times, fresh=fresh, command=command)
    except Stopped:
        engine.any_rank(False)  # the launcher ends all ranks once one has: rank 0 must have saved
        raise
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
    output = Path(config.output_dir)
    with times("load"), console.phase("reading config and tokenizer"):
        files = open_base_on_all(engine, config.base, console)
    if any(prompt.method == "prefix_tuning" for prompt in config.prompts):
        engine.run_on_all(lambda: check_prefix_tuning(files.config, files.name))
    # A requeued job has already moved the earlier run: what is in the folder is its own.
    fresh = fresh and not engine.run_on_main(lambda: was_archived(output))
    date = engine.run_on_main(lambda: _chat_date(files, config, output, fresh=fresh))
    with times("load"), console.phase("reading rows"):
        tasks = _read_tasks(engine, files, config, console, date)
    dtype = str(compute_dtype(config.base.dtype, engine.device)).removeprefix("torch.")
    with times("load"), console.phase("checking the base's files"):
        identity = run_identity(
            config, fingerprint_base_on_all(engine, files, console), dtype, tasks
        )
        identity |= {"date of the chat template": date.isoformat()} if date else {}
    saved = engine.run_on_main(
        lambda: None if fresh else find_checkpoint(output, identity, console)
    )
    if saved is None:
        engine.run_on_all(lambda: check_sources(config, embedding_size(files.config)))
    done = None if fresh else engine.run_on_main(lambda: finished_summary(output))
    if done is not None:
        console.print(f"{output} already holds this finished run; use --fresh to train again")
        if lock is not None:
            write_missing_report(output, console.warn)
        show_results(done, config, console)
        if lock is not None:
            _send_rest(TrackingClient(output, config.tracking.uri), console)
        return

    with times("load"), console.phase("loading the base"):
        loaded, where = _load(engine, files, config, console, tasks, saved)
    embed = embedder(loaded.model, engine.device)
    teachers = {t.index: t.token_ids for data in tasks.values() for t in data.teachers.values()}
    evaluator = Evaluator(
        engine,
        loaded.model,
        files.tokenizer,
        loaded.budget,
        [VirtualTokens(embed(ids)) for _, ids in sorted(teachers.items())],
        _baseline_cache(engine, files, identity, loaded),
    )
    # A resumed bank loads its state over any initial value.
    screen = None if saved else LossInitScorer(config, tasks, evaluator, console)
    begun = without_sources(config) if saved else config
    with times("initialization search"):
        bank = make_bank(begun, engine, loaded.model, files, screen, console.warn)
    feed = StepPrefetcher(
        BatchSource(config, tasks), RankInfo(engine.rank, engine.world_size, engine.device)
    )
    loop = Loop(config, engine, evaluator, tasks, bank, feed, console, times=times)
    if saved is None:
        _begin_alike(engine, bank)
    else:
        _load_state(bank, loop, saved)
        console.print(f"resuming from step {loop.progress.step}/{config.last_step}")
    if fresh:  # nothing can be refused any more
        engine.run_on_main(lambda: archive_earlier_run(output, console))
    stop_signals.defer()
    if lock is None:
        loop.run()
        measure(engine, loop, loaded)
        return

    log = MetricsLog(output)
    log.rewind(loop.progress.step, validated=not loop.progress.unjudged)

    def describe(*, begins: bool = False) -> None:
        describe_run(output, config, engine, loaded, tasks, command, begins=begins)
        if date:
            keep_chat_date(output, date)

    describe(begins=saved is None)
    saves = AsyncCheckpointWriter(
        output / CHECKPOINTS, config.checkpoint.keep, console.warn, lock.confirm
    )
    loop.log = unless_full(log, console.warn)
    loop.predictions = Predictions(output, console.warn)
    if saved is None:
        loop.predictions.clear()
    loop.save = lambda loop: saves.save(lambda: take_run_snapshot(loop, loaded, identity, where))
    sender = TrackingClient(output, config.tracking.uri)
    folder = OutputFolder(output, log, lock, describe)

    def between_steps() -> None:
        saves.report_problems()
        lock.check()
        if problem := sender.new_problem():
            console.warn(problem)
        folder.check(console.warn, lambda: loop.save(loop), saves.wait)

    loop.between_steps = between_steps
    with _tracked(output, sender, console):
        before = loop.progress.train_seconds
        with times("saving"), saves:  # leaving it waits for the checkpoints that are being written
            loop.run()
        folder.check(console.warn, lambda: loop.save(loop), saves.wait, now=True)
        measured = measure(engine, loop, loaded)
        measured["checkpoints"] = saves.report(loop.progress.train_seconds - before)
        with results_can_be_written_later(output):
            lock.confirm()
            summary = write_results(output, loop, files, measured, console)
        show_results(summary, config, console)


def _baseline_cache(
    engine: Engine, files: BaseFiles, identity: Mapping[str, Any], loaded: LoadedBase
) -> BaselineCache:
    """Likelihoods that earlier runs over this base, computed in this way, have kept."""
    base = {key: value for key, value in identity.items() if key.startswith("base.")}
    how = {"matmul": loaded.matmul, "device": engine.device.type, "flex": loaded.model.flex}
    return BaselineCache(base | how, files.num_bytes)


def _load_state(bank: Bank, loop: Loop, saved: SavedCheckpoint) -> None:
    """Continue from a checkpoint.

    Raises:
        BadInput: it is of another run, or its state is damaged in a way that no check has found.
    """
    try:
        bank.load_state_dict(join_tensors(saved.tensors, saved.state["bank"]["prompts"]))
        loop.load_state_dict(saved.state["loop"])
    except BadInput:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise BadInput(
            f"{saved.path}: its state is damaged ({type(error).__name__}: {error}); remove this "
            "folder to resume from an older checkpoint, or use --fresh to start over"
        ) from error


def _begin_alike(engine: Engine, bank: Bank) -> None:
    """Where CPUs of several kinds have drawn or solved for other last bits: all take rank 0's."""
    if len(set(engine.all_gather(bank.digest()))) > 1:
        bank.load_state_dict(engine.run_on_main(bank.state_dict))


@contextmanager
def _locked(engine: Engine, output: Path, console: Console) -> Iterator[Lock | None]:
    """Rank 0 holds the output folder's lock; the others have none."""
    lock = engine.run_on_all(lambda: acquire(output, console.print) if engine.is_main else None)
    try:
        yield lock
    finally:
        if lock is not None:
            lock.release()


def _chat_date(
    files: BaseFiles, config: RunConfig, output: Path, *, fresh: bool
) -> datetime.date | None:
    """The day of the run's first start, if the chat template of its dialogues reads it."""
    if not reads_date(files.tokenizer) or all(task.messages is None for task in config.tasks):
        return None
    kept = None if fresh else read_chat_date(output)
    return kept or datetime.date.today()


def _read_tasks(
    engine: Engine,
    files: BaseFiles,
    config: RunConfig,
    console: Console,
    date: datetime.date | None,
) -> dict[str, TaskData]:
    tasks = engine.load_once_per_node(
        lambda: load_tasks(
            config,
            files.tokenizer,
            files.context_length,
            files.config.vocab_size,
            console.working,
            console.reading,
            date=date,
        ),
    )
    engine.run_on_all(lambda: _check_ends(tasks, files))
    if date:
        console.print(f"the chat template reads the date: {date}, also when the run is resumed")
    runs_code = any(task.metric == "execution" for task in config.tasks)
    if runs_code and (warning := engine.run_on_main(check_sandbox)):
        console.warn(warning)
    for data in tasks.values():
        if ROWS_CHECKED not in os.environ:
            for remark in data.remarks:
                console.print(remark)
            for leak in data.leaks:
                console.warn(leak.warning)
        for warning in data.warnings:
            console.warn(warning)
    return tasks


def _check_ends(tasks: Mapping[str, TaskData], files: BaseFiles) -> None:
    """Check that targets that are compared with generated texts can be generated."""
    problems: list[str] = []
    for data in tasks.values():
        ending = StopCriteria.of(files.generation, files.tokenizer, data.task)
        for rows in data.evaluation.values():
            try:
                warning = check_targets(rows, ending)
            except BadInput as error:
                problems += error.problems
                continue
            if warning is not None and warning not in data.warnings:
                data.warnings.append(warning)
    if problems:
        raise BadInput(problems)


def _load(
    engine: Engine,
    files: BaseFiles,
    config: RunConfig,
    console: Console,
    tasks: Mapping[str, TaskData],
    saved: SavedCheckpoint | None,
) -> tuple[LoadedBase, dict[str, Any]]:
    """The base as a checkpoint was made over it, and what that is comparable with."""
    where = choice_conditions(config, device_name(engine.device), engine.world_size)
    sample = [n for data in tasks.values() for n in data.train.lengths[:SAMPLE].tolist()]
    chosen = None if saved is None else saved_choices(saved, where)
    if chosen is None:
        return load_base(engine, files, config, console, lengths=sample), where
    loaded = load_base(
        engine,
        files,
        apply_choices(config, chosen),
        console,
        lengths=sample,
        kept_bytes=chosen["kept_bytes"],
    )
    loaded.budget.ramp = list(chosen["ramp"])
    return loaded, where


def make_bank(
    config: RunConfig,
    engine: Engine,
    base: PromptedBase,
    files: BaseFiles,
    screen: LossInitScorer | None,
    warn: Callable[[str], None],
) -> Bank:
    """The prompts of a run, over a base that all ranks call alike."""
    return Bank(
        config,
        embedder(base, engine.device),
        files.tokenizer,
        files.config.vocab_size,
        base.hidden_size,
        engine.device,
        make_optimizer=make_optimizer,
        past=lambda ids: keys_and_values(engine, base, ids),
        screen=screen,
        warn=warn,
    )


def embedder(base: nn.Module, device: torch.device) -> Any:
    """Word embeddings [n, H] of token ids; the table is shared out: all ranks call it alike."""

    def embed(token_ids: Any) -> torch.Tensor:
        with torch.no_grad():
            ids = torch.as_tensor(token_ids, device=device)
            embedded: torch.Tensor = base(ids, []).float()
            return embedded

    return embed


@contextmanager
def _tracked(output: Path, sender: TrackingClient, console: Console) -> Iterator[None]:
    """Run the sender beside the run; write a summary if the run fails."""
    (output / SUMMARY_FILE).unlink(missing_ok=True)
    sender.start()
    try:
        yield
    except Exception as error:
        summary = RunSummary(status="failed", error=redact(str(error)))
        if not isinstance(error, LockLost):  # the folder is another's
            with suppress(OSError):  # full, perhaps: what counts is why the run ends
                save_summary(output, summary)
        # The launcher ends this rank a second after another has failed: say why before the tracker
        # is waited for.
        console.failure(error)
        sender.finish(FAILED_SECONDS)
        raise
    except KeyboardInterrupt:  # not the end: the same command resumes
        sender.finish(FAILED_SECONDS)
        raise
    else:
        _finish_sending(sender, console)


def _send_rest(sender: TrackingClient, console: Console) -> None:
    """Send what an earlier process of a finished run could not."""
    if sender.has_unsent():
        sender.start()
    _finish_sending(sender, console)


def _finish_sending(sender: TrackingClient, console: Console) -> None:
    with console.phase("sending metrics to MLflow"):
        finished = sender.finish(LOCAL_STORE_SECONDS if sender.is_local else SERVER_SECONDS)
    if finished.complete:
        console.print(f"curves:  {finished.message}")
    else:
        console.warn(finished.message)
