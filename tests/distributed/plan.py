"""Rank program: what runs need, measured: resident, gathered and saved bytes, FLOPs, peak memory.

python -m tests.distributed.plan OUT.json STEP (RUN.yaml OVERRIDES_AS_JSON)...
"""

from __future__ import annotations

import ctypes
import gc
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

from benchmarks.peers.counters import FlopCounter
from benchmarks.random_base import make_tokenizer
from tests.distributed.loading import resident_bytes
from trainer.config import RunConfig, load
from trainer.data.task_data import load_tasks
from trainer.distributed.deepspeed_engine import Engine
from trainer.distributed.model_loading import load_base
from trainer.distributed.prefetch import RankInfo, prepare_step
from trainer.distributed.zero3_sharder import base_bytes
from trainer.model.checkpoint_files import open_base
from trainer.packing.batch_source import BatchSource
from trainer.prompts.soft_prompt import VirtualTokens, prompt_lengths
from trainer.runtime.console import Console
from trainer.runtime.freed_memory import M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
from trainer.runtime.process import flush_and_exit
from trainer.training.initial_bank import embedding_function, make_bank
from trainer.training.saved_tensors import SavedBytes
from trainer.training.step import StepResult, batch_gradients


def main() -> None:
    out, index, *arguments = sys.argv[1:]
    pairs = zip(arguments[::2], arguments[1::2], strict=True)
    configs = {Path(path).stem: load(path, json.loads(overrides)) for path, overrides in pairs}
    return_tensors()
    engine = Engine(300)
    steps = int(index)
    measure(engine, next(iter(configs.values())), steps)  # brings the code that all runs need
    results = {name: measure(engine, config, steps) for name, config in configs.items()}
    every = engine.all_gather(results)
    if engine.is_main:
        Path(out).write_text(json.dumps({"ranks": every}))
    engine.close()


def measure(engine: Engine, config: RunConfig, steps: int) -> dict[str, Any]:
    """Train ``steps`` steps for the peak of memory, and one for what it computes and gathers.

    DeepSpeed gathers fewer layers once it has recorded two passes.
    """
    console = Console(io.StringIO(), io.StringIO(), shown=False)
    files = open_base(config.base)
    # Not that of the folder: transformers replaces it by the one of some families.
    tasks = load_tasks(config, make_tokenizer(), files.context_length, files.config.vocab_size)
    return_holes()
    lengths = [n for data in tasks.values() for n in data.train.lengths.tolist()]
    loaded = load_base(engine, files, config, console, lengths=lengths)
    bank = make_bank(config, engine, loaded.model, files, None, console.warn)
    before, code = start_peak()
    source = BatchSource(config, tasks)
    embed = embedding_function(loaded.model, engine.device)
    texts = {t.index: t.token_ids for data in tasks.values() for t in data.teachers.values()}
    teachers = [VirtualTokens(embed(ids), ids) for _, ids in sorted(texts.items())]
    rank = RankInfo(engine.rank, engine.world_size, engine.device)

    def step(saved: SavedBytes | None) -> StepResult:
        prompts = bank.virtual_tokens()
        rows = source.next_step(bank.active)
        batch = prepare_step(rows, prompt_lengths(prompts), rank, loaded.budget.tokens)
        result = batch_gradients(engine, loaded.model, batch, prompts, saved, teachers)
        bank.update(result.gradients)
        return result

    for _ in range(steps):  # the hooks of ``SavedBytes`` would delay the release of tensors
        step(None)
    peak = resident_bytes("VmHWM") - before - (resident_bytes("RssFile") - code)
    received = engine.gathered_bytes
    saved = SavedBytes()
    with FlopCounter() as counter:
        result = step(saved)
    measured = {
        "peak": peak,
        "base": base_bytes(loaded.model),
        "gathered": engine.gathered_bytes - received,
        "flops": counter.total,
        "saved_per_token": saved.total / result.first_batch,
        "budget": loaded.budget.tokens,
    }
    del result, saved, step
    engine.release(loaded.model)
    return measured


def return_tensors() -> None:
    """Have the C library return freed tensors at once: what it keeps depends on earlier cases."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # loading a base changes nothing then
    for threshold in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
        ctypes.CDLL(None).mallopt(threshold, 1 << 16)


def return_holes() -> None:
    """Return freed memory of earlier cases, into which loading then writes small objects."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def start_peak() -> tuple[int, int]:
    """Start a new peak; return the resident bytes, and those of code among them."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident_bytes("VmRSS"), resident_bytes("RssFile")


if __name__ == "__main__":
    main()
    flush_and_exit(0)  # as the trainer does: threads of libraries abort in a usual end
