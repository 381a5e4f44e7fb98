"""A run, from a checked run file to results: wires the parts in the order of the data.

run file -> base files, tasks -> tokens -> sharded base -> bank -> loop -> adapters, summary, report
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer import atomic
from trainer.base.families import check_past, embedding_size
from trainer.config import RunConfig
from trainer.console import Console
from trainer.engine import Engine
from trainer.evaluation import Evaluator
from trainer.generation import keys_and_values
from trainer.loop import Loop
from trainer.optimization import make_optimizer
from trainer.prefetch import Prefetch, Rank
from trainer.prompts.bank import Bank
from trainer.prompts.source import check_sources
from trainer.redact import redact
from trainer.results import describe_run, finish, measure, show_results
from trainer.resume import (
    find_checkpoint,
    identity_of,
    is_finished,
    put_aside,
    save_checkpoint,
)
from trainer.sharded import load, open_files
from trainer.starts import Screening
from trainer.tasks.feed import Feed, load_tasks
from trainer.tracking import MetricsLog, Sender, check_uri

#: How long the end of a run waits for the tracker: a file on a busy machine is only slow, a server
#: may be down.
LOCAL_STORE_SECONDS, SERVER_SECONDS, FAILED_SECONDS = 90.0, 20.0, 3.0

#: Rows of each task whose lengths tell how much streams will take.
SAMPLE = 1000


def train(config: RunConfig, console: Console, *, fresh: bool, command: str) -> None:
    """Train all prompts of a run, or go on where its output folder says it stopped.

    Raises:
        BadInput: for what a person can mend, on all ranks together.
    """
    output = Path(config.output_dir)
    engine = Engine(config.engine.timeout_seconds)
    engine.together(lambda: check_uri(config.tracking.uri))
    files = open_files(engine, config.base, console)
    if any(prompt.method == "prefix_tuning" for prompt in config.prompts):
        engine.together(lambda: check_past(files.config, files.name))
    engine.together(lambda: check_sources(config, embedding_size(files.config)))
    tasks = engine.load_once_per_node(
        lambda: load_tasks(
            config,
            files.tokenizer,
            files.context_length,
            files.config.vocab_size,
            console.working,
            console.reading,
        ),
    )
    for data in tasks.values():
        for remark in data.remarks:
            console.say(remark)
        for leak in data.leaks:
            console.warn(leak.warning)
    if fresh:
        engine.together(lambda: put_aside(output, console) if engine.is_main else None)
    identity = identity_of(config, files, tasks)
    saved = engine.broadcast(
        engine.together(lambda: find_checkpoint(output, identity) if engine.is_main else None)
    )
    if engine.broadcast(is_finished(output) if engine.is_main else None):
        console.say(f"{output} holds this run, finished; --fresh would train it anew")
        show_results(json.loads((output / "summary.json").read_text()), config, console)
        engine.close()
        return

    sample = [n for data in tasks.values() for n in data.train.lengths[:SAMPLE].tolist()]
    loaded = load(engine, files, config, console, lengths=sample)
    embed = _embedder(loaded.model, engine.device)
    teachers = {t.index: t.token_ids for data in tasks.values() for t in data.teachers.values()}
    evaluator = Evaluator(
        engine,
        loaded.model,
        files.tokenizer,
        loaded.budget,
        [embed(ids) for _, ids in sorted(teachers.items())],
    )
    # A bank that goes on loads its state over any start.
    choose = None if saved else Screening(config, tasks, evaluator, console).choose
    bank = Bank(
        config,
        embed,
        files.tokenizer,
        files.config.vocab_size,
        loaded.model.hidden_size,
        engine.device,
        make_optimizer=make_optimizer,
        past=lambda ids: keys_and_values(engine, loaded.model, ids),
        choose=choose,
        warn=console.warn,
    )
    feed = Prefetch(Feed(config, tasks), Rank(engine.rank, engine.world_size, engine.device))
    log = MetricsLog(output) if engine.is_main else None

    def save(loop: Loop) -> None:
        if engine.is_main:
            save_checkpoint(output, loop, identity, console)

    loop = Loop(
        config,
        engine,
        evaluator,
        tasks,
        bank,
        feed,
        console,
        log=log.log if log else lambda *_: None,
        save=save,
    )
    if saved is not None:
        tensors, state = saved
        bank.load_state(tensors, state["bank"])
        loop.load_state(state["loop"])
        console.say(f"going on from step {loop.progress.step} of {config.last_step}")
    if not engine.is_main:
        loop.run()
        measure(engine, loop, loaded)
        engine.close()
        return

    assert log is not None
    log.rewind(loop.progress.step)
    describe_run(output, config, engine, loaded, tasks, command)
    with _tracked(output, config.tracking.uri, console) as ended:
        loop.run()
        ended |= finish(output, loop, loaded, files, measure(engine, loop, loaded), console)
        show_results(ended, config, console)
    engine.close()


def _embedder(base: nn.Module, device: torch.device) -> Any:
    """Word embeddings [n, H] of token ids; the table is shared out: all ranks call it alike."""

    def embed(token_ids: Any) -> torch.Tensor:
        with torch.no_grad():
            ids = torch.as_tensor(token_ids, device=device)
            embedded: torch.Tensor = base(ids, []).float()
            return embedded

    return embed


@contextmanager
def _tracked(output: Path, uri: str | None, console: Console) -> Iterator[dict[str, Any]]:
    """The tracker's process around the run; the summary says how the run ended."""
    (output / "summary.json").unlink(missing_ok=True)
    sender = Sender(output, uri)
    sender.start()
    ended: dict[str, Any] = {}
    try:
        yield ended
    except Exception as error:
        summary = {"status": "failed", "error": redact(str(error))}
        atomic.write_json(output / "summary.json", summary)
        # The launcher ends this rank a second after another has failed: say why before the tracker
        # is waited for.
        console.failure(error)
        sender.finish(FAILED_SECONDS)
        raise
    except KeyboardInterrupt:  # not an end: the same command goes on
        sender.finish(FAILED_SECONDS)
        raise
    else:
        local = uri is None and "MLFLOW_TRACKING_URI" not in os.environ
        finished = sender.finish(LOCAL_STORE_SECONDS if local else SERVER_SECONDS)
        if finished.complete:
            console.say(f"curves:  {finished.message}")
        else:
            console.warn(finished.message)
