"""Train rows whose hidden states are most similar to those of a row (``--retriever cosine``).

A text is represented by the mean of its last hidden states, minus the mean over the train rows: the
states of a language model have a large common component, beside which cosine similarities differ
little (Mu and Viswanath, All-but-the-Top, arXiv 1702.01417).

Shape letters: A train rows, R rows to answer, H hidden size.
"""

from __future__ import annotations

import hashlib
import time

from torch import Tensor
from torch.nn.functional import normalize

from trainer.commands.evaluate.arm import Similar
from trainer.commands.evaluate.arms import ArmBuilder
from trainer.commands.evaluate.scoring_pass import BaseOnDemand
from trainer.commands.evaluate.store import PredictionStore
from trainer.data.retrieval import retrieve
from trainer.evaluation.read_texts import mean_hidden_states


def cosine_similar(
    builder: ArmBuilder, base: BaseOnDemand, store: PredictionStore | None
) -> Similar:
    """Retrieve rows for the rows of a task; a collective. An earlier result is read from the store.

    Args:
        store: on rank 0.

    Raises:
        Stopped: on all ranks, after a stop signal.
    """
    task, (train, rows) = builder.task.name, _texts(builder)
    content = f"{base.digest} {builder.options.retrieved} {train} {rows}"
    digest = hashlib.sha256(content.encode()).hexdigest()
    kept = base.engine.run_on_main(
        lambda: None if store is None else store.read_retrieved(task, digest)
    )
    if kept is not None:
        return Similar(**kept)
    started = time.perf_counter()
    with base.console.phase("reading rows to compare", len(train) + len(rows), "texts") as phase:
        states = mean_hidden_states(base.evaluator, [*train, *rows], phase.advance)
    seconds = (time.perf_counter() - started) * len(train) / (len(train) + len(rows))
    cosine_RA = cosines(states[len(train) :], states[: len(train)])
    retrieved = Similar(
        retrieve(
            builder.task,
            builder.data.train_rows,
            builder.own_rows(),
            builder.options.retrieved or 0,
            cosine_RA.numpy(),
        ),
        seconds,
        query_tokens=sum(map(len, rows)) / len(rows),
        num_bytes=states[: len(train)].numel() * states.element_size(),
    )
    if store is not None:
        store.keep_retrieved(task, digest, vars(retrieved))
    return base.engine.broadcast(retrieved if base.engine.is_main else None)


def _texts(builder: ArmBuilder) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Token ids of the train rows and of the rows to answer, without prompt and answer."""
    task = builder.task.model_copy(update={"too_long": "truncate"})
    table = builder.encoder.table(builder.data.train_rows, task, per_choice=False)
    train = [example.input_ids[: example.last_target[0]] for example in table]
    rows = [row[0].input_ids[: row[0].last_target[0]] for row in builder.plain.candidates]
    return train, rows


def cosines(rows_RH: Tensor, train_AH: Tensor) -> Tensor:
    """Cosine similarity of every row to every train row, [R, A], after centering on these."""
    mean_H = train_AH.mean(0)
    return normalize(rows_RH - mean_H, dim=1) @ normalize(train_AH - mean_H, dim=1).T
