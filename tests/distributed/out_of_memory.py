"""Rank program: packed batches that do not fit, with an allocator that fails on demand.

python -m tests.distributed.out_of_memory OUT.json BASE SHARD_GROUP ...
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.zero import partition_parameters

from tests.base_digest import base_digest
from tests.distributed.equivalence import problem
from tests.distributed.sharded_base import run_config, shard_base
from tests.family_bases import errors
from tests.scarce_memory import scarce
from trainer.distributed.deepspeed_engine import Engine
from trainer.distributed.prefetch import prepare_batch
from trainer.evaluation.generation import keys_and_values
from trainer.prompts.soft_prompt import prompt_lengths
from trainer.runtime.process import flush_and_exit
from trainer.training.step import OutOfMemory, step_gradients

TOKENS = 10_000


def main() -> None:
    out, folder, *groups = sys.argv[1:]
    engine = Engine(120)
    results = {group: run_short(engine, folder, int(group)) for group in groups}
    if engine.is_main:
        Path(out).write_text(json.dumps(results))
    engine.close()


def run_short(engine: Engine, folder: str, shard_group: int) -> dict[str, Any]:
    """Run steps that exhaust memory in forward, then in backward unless the first is refused."""
    config = run_config(folder, "int8", num_prompts=2, shard_group=shard_group)
    loaded = shard_base(engine, config, placed=True)
    base, placement = loaded.model, loaded.placement
    assert placement is not None
    module = engine.attach(base, loaded.policy, placement.kept_bytes)
    digest = base_digest(base)
    rows, prompts = problem()
    # A rank alone may always retry; of several, none before training has been traced.
    retries_untraced = engine.world_size > 1 and engine.recover_from_oom()
    for _ in range(2):  # DeepSpeed learns the order of layers
        expected = step_gradients(engine, module, rows, prompts, TOKENS)
    mine = sum(len(row.example.input_ids) for row in rows) // engine.world_size
    ways: dict[str, Any] = {}
    # Half of this rank's tokens fit; on other ranks than the first, everything does.
    limit = int(0.8 * mine) if engine.rank == 0 or shard_group > 1 else TOKENS
    for way in ("forward", "backward", "gather")[: 2 if shard_group > 1 else 3]:
        try:
            with failing_copy() if way == "gather" else scarce(base, limit, way == "backward"):
                gradients = step_gradients(engine, module, rows, prompts, TOKENS)
            after = step_gradients(engine, module, rows, prompts, TOKENS)
            ways[way] = {
                "losses": [gradients.losses, expected.losses],
                "splits": [gradients.splits, after.splits],
                "errors": errors(gradients.gradients, expected.gradients)
                + errors(after.gradients, expected.gradients),
            }
        except OutOfMemory as error:
            ways[way] = {"refusal": str(error)}
            break
    retries_retraced = engine.world_size > 1 and _retries_after_decoding(engine, module)
    return {
        "ways": ways,
        "retries_untraced": retries_untraced,
        "retries_retraced": retries_retraced,
        "digest_kept": base_digest(base) == digest,
    }


@contextmanager
def failing_copy() -> Iterator[None]:
    """Let the copy of a layer to the device fail once, after its first parameter."""
    handle: Any = partition_parameters.NoGatherCoalescedHandle

    def fail(self: Any, parameters: Sequence[Any]) -> None:
        first = parameters[0]
        first.data = first.ds_tensor.view(first.ds_shape).clone()
        handle.__init__ = original
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")

    original, handle.__init__ = handle.__init__, fail
    try:
        yield
    finally:
        handle.__init__ = original


@torch.no_grad()
def _retries_after_decoding(engine: Engine, module: Any) -> bool:
    """Whether a rank retries alone after decoding and packed forwards without gradient."""
    keys_and_values(engine, module, [3, 4, 5])
    rows, prompts = problem()
    for _ in range(2):
        module(prepare_batch(rows, prompt_lengths(prompts), engine.device), prompts)
    return engine.recover_from_oom()


if __name__ == "__main__":
    main()
    flush_and_exit(0)  # as the trainer does: threads of libraries abort in a usual end
