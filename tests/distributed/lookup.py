"""Rank program: row exchange of a sharded table, under every placement of the base.

python -m tests.distributed.lookup OUT.json BASE
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import embedding

from tests.base_digest import base_digest
from tests.distributed.equivalence import problem
from tests.distributed.sharded_base import run_config, shard_base
from tests.family_bases import errors
from trainer.distributed.deepspeed_engine import Engine
from trainer.distributed.zero3_sharder import base_bytes
from trainer.evaluation.generation import generate
from trainer.evaluation.stop_criteria import StopCriteria
from trainer.model.checkpoint_files import open_base
from trainer.model.layers.quantization import dequantize_rows, quantize_rows
from trainer.model.prompted_model import PromptedBase
from trainer.packing.packed_batch import PackedBatch, build_packed_batch
from trainer.packing.packed_row import PackedRow
from trainer.packing.planning import plan_batches
from trainer.prompts.soft_prompt import SoftPrompt, prompt_lengths
from trainer.runtime.process import flush_and_exit
from trainer.training.step import step_gradients

TABLE = "model.embed_tokens.weight"
HIDDEN = 64
MAX_TOKENS = 40  # several packed batches a rank
#: name: settings of the base, of the engine
WAYS: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "world": ({}, {}),
    "pairs": ({}, {"shard_group": 2}),
    "copies": ({}, {"shard_group": 1}),
    "offload": ({}, {"deepspeed": "ds_configs/zero3_offload_cpu.json"}),
    "int8": ({"embeddings": "int8"}, {"shard_group": 2}),
}


def main() -> None:
    out, folder = sys.argv[1:]
    engine = Engine(120)
    results = {name: one_way(engine, folder, *way) for name, way in WAYS.items()}
    gradients = {name: result.pop("gradients") for name, result in results.items()}
    for name, result in results.items():
        result["gradient_errors"] = errors(gradients[name], gradients["copies"])
    every = engine.all_gather(results)
    if engine.is_main:
        Path(out).write_text(json.dumps({"ranks": every}))
    engine.close()


def one_way(
    engine: Engine, folder: str, base_settings: dict[str, str], engine_settings: dict[str, Any]
) -> dict[str, Any]:
    config = run_config(folder, "int8", **engine_settings)
    settings = config.base.model_copy(update=base_settings)
    config = config.model_copy(update={"base": settings})
    loaded = shard_base(engine, config, checkpointing=True, placed=True)
    base, placement = loaded.model, loaded.placement
    assert placement is not None
    engine.attach(base, loaded.policy, placement.kept_bytes)
    digest = base_digest(base)
    table_VH = load_file(f"{folder}/model.safetensors")[TABLE]
    if settings.embeddings == "int8":
        table_VH = dequantize_rows(*quantize_rows(table_VH))
    ranks = placement.group_size

    before = engine.gathered_bytes
    equal = [
        torch.equal(base(ids, []).embeddings_TH, embedding(ids, table_VH))
        for ids in asked(engine.rank, len(table_VH))
    ]
    lookups = engine.gathered_bytes - before

    packed_rows, prompts = many()
    before = engine.gathered_bytes
    step = step_gradients(engine, base, packed_rows, prompts, MAX_TOKENS)
    gathered = engine.gathered_bytes - before
    rows = base.model.get_input_embeddings().rows
    ending = StopCriteria(open_base(settings).tokenizer, frozenset({1}))
    inputs = [
        list(packed_row.example.input_ids[:5]) for packed_row in packed_rows[:5]
    ]  # fewer than two each
    texts = [text.ids for text in generate(engine, base, ending, inputs, prompts[0], 6)]
    bytes_read = loaded.stats.bytes_read
    is_kept = base_digest(base) == digest
    for_inference = shard_base(engine, config, placed=True)
    resident = for_inference.model
    kept = placement.kept_bytes
    engine.attach(resident, for_inference.policy, kept, only_inference=True)
    before = engine.gathered_bytes - engine.exchanged_bytes
    texts_of_resident = [t.ids for t in generate(engine, resident, ending, inputs, prompts[0], 6)]
    gathered_by_resident = engine.gathered_bytes - engine.exchanged_bytes - before
    lean = shard_base(engine, config, placed=True)
    engine.attach(lean.model, lean.policy, 0, only_inference=True)
    return {
        "resident_has_hooks": any(module._forward_pre_hooks for module in resident.modules()),
        "lean_has_hooks": any(module._forward_pre_hooks for module in lean.model.modules()),
        "texts_of_resident": texts_of_resident,
        "gathered_by_resident": gathered_by_resident,
        "equal": equal,
        "lookup_bytes": lookups,
        "expected_lookup_bytes": row_bytes(
            list(zip(*(asked(r, len(table_VH)) for r in range(engine.world_size)), strict=True)),
            *(engine.rank, ranks, rows),
        ),
        "losses": step.losses,
        "gradients": step.gradients,
        "gathered": gathered,
        "expected_gathered": layer_bytes(base, ranks)
        + row_bytes(words(engine.world_size), engine.rank, ranks, rows)
        + head_bytes(labels(engine.world_size), engine.rank, ranks, base),
        "texts": texts,
        "block": list(rows.shape),
        "type": str(rows.dtype),
        "table_is_a_parameter": any(p.ds_numel == table_VH.numel() for p in embeddings(base)),
        "table_fetched": fetches_table(labels(engine.world_size), engine.rank, ranks, base),
        "base_bytes": base_bytes(base),
        "bytes_read": bytes_read,
        "digest_kept": is_kept,
    }


def asked(rank: int, vocab_size: int) -> list[Tensor]:
    """Token ids of this rank in lookups that all ranks make together."""
    draw = torch.Generator().manual_seed(rank)
    return [
        torch.randint(vocab_size, (50,), generator=draw),
        torch.randint(vocab_size, (rank * 7,), generator=draw),  # none on rank 0
        torch.randint(vocab_size // 4, (4, 5), generator=draw),  # all on one owner
        torch.arange(vocab_size) if rank == 1 else torch.tensor([vocab_size - 1]),
    ]


def many() -> tuple[list[PackedRow], list[SoftPrompt]]:
    """Rows with so many labels that a step gathers the head's table."""
    packed_rows, prompts = problem()
    return packed_rows * 6, prompts


def batches(world_size: int) -> list[tuple[PackedBatch, ...]]:
    """Packed batches of the step, one tuple of all ranks' batches per position."""
    packed_rows, prompts = many()
    lengths = prompt_lengths(prompts)
    plan = plan_batches(packed_rows, lengths.tokens, world_size, MAX_TOKENS)
    return [
        tuple(build_packed_batch(batch, lengths.tokens, lengths.past) for batch in together)
        for together in zip(*plan, strict=True)
    ]


def words(world_size: int) -> list[tuple[Tensor, ...]]:
    """Ids of each lookup."""
    return [tuple(batch.token_ids_T for batch in together) for together in batches(world_size)]


def labels(world_size: int) -> list[tuple[int, ...]]:
    """Number of label positions of each rank in each packed batch."""
    return [tuple(len(batch.labels_N) for batch in together) for together in batches(world_size)]


def row_bytes(lookups: list[tuple[Tensor, ...]], rank: int, ranks: int, rows: Tensor) -> int:
    """Bytes a rank receives for embeddings: counts, ids and rows from the other ranks."""
    first = rank // ranks * ranks
    total = 0
    for ids in lookups:
        owners = [(one.unique() // len(rows) + first).tolist() for one in ids]
        foreign = sum(owner != rank for owner in owners[rank])
        others = [owners[r] for r in range(first, first + ranks) if r != rank]
        total += foreign * rows.shape[1] * rows.element_size()
        total += 8 * sum(1 + owners.count(rank) for owners in others)
    return total if ranks > 1 else 0


def fetches_table(
    batches: list[tuple[int, ...]], rank: int, ranks: int, base: PromptedBase
) -> bool:
    """Whether the labels of the step exceed the table while those of no packed batch do."""
    first = rank // ranks * ranks
    moved = [2 * ranks * max(counts[first : first + ranks]) * HIDDEN * 4 for counts in batches]
    return max(moved) < base.model.get_output_embeddings().table_bytes < sum(moved)


def head_bytes(batches: list[tuple[int, ...]], rank: int, ranks: int, base: PromptedBase) -> int:
    """Bytes a rank receives for losses: counts, hidden states, labels and sums, or the table."""
    head = base.model.get_output_embeddings()
    first, total, moved = rank // ranks * ranks, 0, 0
    for counts in batches:
        most = max(counts[first : first + ranks])
        total += (ranks - 1) * 3 * 8
        moved += 2 * ranks * most * HIDDEN * 4
        if moved > head.table_bytes:  # which stays until the step has ended
            return total + (ranks - 1) * head.rows.nbytes
        total += (ranks - 1) * most * (2 * HIDDEN * 4 + 8)
        total += 2 * (ranks - 1) * most * 4 + 2 * (ranks - 1) * most * 2 * 4
    return total if ranks > 1 else 0


def layer_bytes(base: PromptedBase, ranks: int) -> int:
    """Bytes of all layers once, without this rank's own shard."""
    shards: list[Any] = [p.ds_tensor for p in base.parameters()]  # type: ignore[attr-defined]
    return sum(shard.nbytes for shard in shards) * (ranks - 1)


def embeddings(base: PromptedBase) -> list[Any]:
    return list(base.model.get_input_embeddings().parameters())


if __name__ == "__main__":
    main()
    flush_and_exit(0)  # as the trainer does: threads of libraries abort in a usual end
