"""The base on all ranks: read, quantised, sharded, attached; used by training and generation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PretrainedConfig, PreTrainedModel

from trainer.config import Base, RunConfig
from trainer.distributed.deepspeed_config import resolve_policy
from trainer.distributed.deepspeed_engine import Engine, compute_dtype
from trainer.distributed.placement import Placement
from trainer.model.attention.interface import resolve_attention
from trainer.model.checkpoint_files import BaseFiles, local_folder, open_base
from trainer.model.families import family_of, layer_sizes
from trainer.model.fingerprint import (
    combine_weight_digests,
    digest_small_files,
    digest_weight_files,
    weight_files,
)
from trainer.model.layers.fused_ops import compile_fused_operations, fused_counts
from trainer.model.layers.matmul_selection import (
    MEASURE,
    candidates,
    largest_shapes,
    measure,
    resolve_matmul,
    use_matmul,
)
from trainer.model.layers.vocab_parallel import LOGITS_BYTES
from trainer.model.meta_model import build_meta_model
from trainer.model.prompted_model import PromptedBase
from trainer.model.shard_loading import LoadStats, load_shards
from trainer.packing.activation_memory import (
    CPU_TOKENS,
    RAMP,
    USABLE_SHARE,
    BatchMemory,
    TokenBudget,
    choose_budget,
    row_sizes,
)
from trainer.runtime.console import Console
from trainer.runtime.errors import BadInput

#: A base whose digest takes seconds to compute.
SLOW_BYTES = 5_000_000_000


@dataclass(frozen=True)
class LoadedBase:
    """The base on this rank's device, sharded and attached."""

    model: PromptedBase
    stats: LoadStats
    dtype: torch.dtype
    placement: Placement
    matmul: str
    memory: BatchMemory
    budget: TokenBudget


def open_base_on_all(engine: Engine, settings: Base, console: Console) -> BaseFiles:
    """The base's files, on all ranks. One rank of each node downloads what its cache lacks.

    Raises:
        BadInput: on all ranks, if the files are not there, not supported, or not the same on all.
    """

    def download() -> BaseFiles | None:
        if local_folder(settings) is not None:
            return None
        with console.downloading(settings.model) as progress:
            return open_base(settings, progress=progress)

    downloaded = engine.run_on_each_node(download)
    files = engine.run_on_all(lambda: downloaded or open_base(settings, download=False))
    for warning in files.parameters.warnings:
        console.warn(warning)
    if len(set(engine.all_gather(files.fingerprint))) > 1:
        raise BadInput(
            f"base.model: {settings.model!r} is not the same on all nodes; name a commit in "
            "base.revision, or copy one folder to all"
        )
    return files


def fingerprint_base_on_all(engine: Engine, files: BaseFiles, console: Console) -> dict[str, str]:
    """Digests of the base's parts, on all ranks. The weight files are shared out among them."""
    if files.num_bytes >= SLOW_BYTES:
        size = f"{files.num_bytes / 1e9:,.0f} GB"
        console.print(f"digests of the base's files ({size}; remembered until they change)")
    mine = weight_files(files)[engine.rank :: engine.world_size]
    found = engine.run_and_gather(lambda: digest_weight_files(mine))
    return digest_small_files(files) | combine_weight_digests(
        {k: v for part in found for k, v in part.items()}
    )


def load_base(
    engine: Engine,
    files: BaseFiles,
    config: RunConfig,
    console: Console,
    *,
    must_fit: bool = False,
    lengths: Sequence[int] = (),
    kept_bytes: int | None = None,
) -> LoadedBase:
    """Read, quantise, shard and attach the base, with a progress bar.

    Args:
        must_fit: refuse a base that does not fit into the memory that is free, instead of trying.
        lengths: tokens of the rows to train on, or of a sample; none where nothing is trained.
        kept_bytes: of gathered parameters that stay until a step ends, where there is memory for
            them; None: as many as there is memory for.
    """
    settings = config.base
    dtype = compute_dtype(settings.dtype, engine.device)
    policy = engine.run_on_all(lambda: resolve_policy(config, dtype, files.config.hidden_size))
    # All that can be wrong without reading weights is found here, before minutes of reading.
    skeleton = engine.run_on_all(lambda: build_meta_model(files, settings, dtype, engine.device))
    if fused := fused_counts(skeleton):
        counts = ", ".join(f"{count} {operation}" for operation, count in sorted(fused.items()))
        console.print(f"fused operations: {counts}")
    matmul = _choose_matmul(engine, settings, skeleton, dtype, console)
    packed = family_of(files.config, files.name).packed
    flex = engine.run_on_all(
        lambda: resolve_attention(config.engine.attention, engine.device, packed)
    )
    if not packed:
        console.print(
            f"base.model: {files.config.model_type} cannot read packed rows; the rows of a batch "
            "are padded to its longest (slower, and more memory: lower training.micro_batch_tokens "
            "where it runs short)"
        )
    offload = policy["zero_optimization"].get("offload_param", {}).get("device") == "cpu"
    placement = engine.place(skeleton, config, dtype, offload=offload, must_fit=must_fit)
    if kept_bytes is not None and kept_bytes < placement.kept_bytes:
        placement = replace(placement, kept_bytes=kept_bytes)
    policy = resolve_policy(config, dtype, files.config.hidden_size, placement)
    memory, budget = _batches(engine, files.config, config, placement, dtype, lengths)
    if lengths:
        console.print(budget.words)
    share = files.num_bytes // placement.group_size
    with console.loading(f"loading {settings.model}", share) as bar:
        base, stats = load_shards(
            skeleton,
            files,
            dtype=dtype,
            device=engine.device,
            shard=engine.sharder(policy, placement.group_size),
            checkpointing=budget.checkpointing,
            progress=bar.advance,
        )
    base.flex = flex
    engine.attach(base, policy, placement.kept_bytes)
    return LoadedBase(base, stats, dtype, placement, matmul, memory, budget)


def _batches(
    engine: Engine,
    model: PretrainedConfig,
    config: RunConfig,
    placement: Placement,
    dtype: torch.dtype,
    lengths: Sequence[int],
) -> tuple[BatchMemory, TokenBudget]:
    """How long packed batches may be; alike on all ranks, as what it follows from is."""
    on_cpu = engine.device.type == "cpu"
    virtual = [prompt.num_virtual_tokens for prompt in config.prompts]
    # Rows are whole, so that a step is not shared out quite evenly.
    rows = 1.05 * config.training.tokens_per_step * len(virtual) / engine.world_size
    wanted = int(rows) + sum(virtual) + max(lengths, default=0)
    memory = BatchMemory(
        layer_sizes(model),
        row_sizes(
            lengths,
            max(virtual),
            family_of(model, model.model_type).packed,
            copied=not on_cpu,
        ),
        dtype.itemsize,
        min(LOGITS_BYTES, 4 * model.vocab_size * wanted),
    )
    tokens = config.training.micro_batch_tokens
    checkpointing = config.engine.gradient_checkpointing
    budget = choose_budget(
        memory,
        int(USABLE_SHARE * placement.left_bytes),
        wanted,
        tokens=None if tokens == "auto" else tokens,
        checkpointing=None if checkpointing == "auto" else checkpointing,
        most=CPU_TOKENS if on_cpu else None,
        ramp=(1.0,) if on_cpu else RAMP,
    )
    return memory, budget


def _choose_matmul(
    engine: Engine, settings: Base, skeleton: PreTrainedModel, dtype: torch.dtype, console: Console
) -> str:
    """Set how the layers multiply, alike on all ranks: ``base.matmul``, or what rank 0 measured."""
    found = engine.run_on_all(
        lambda: resolve_matmul(
            settings.matmul, settings.quantization, engine.device, skeleton.config.hidden_size
        )
    )
    kinds = set(engine.all_gather(found))
    matmul = found if len(kinds) == 1 else "dequantize"  # auto, on devices that are not alike
    if matmul == MEASURE:
        shapes = largest_shapes(skeleton)
        with console.phase("timing ways to multiply (base.matmul: auto)"):
            every_rank = engine.all_gather(candidates())
            shared = [kind for kind in every_rank[0] if all(kind in rank for rank in every_rank)]
            measured = engine.run_on_main(
                lambda: measure(shared, shapes, dtype, engine.device, settings.outlier_threshold)
            )
        matmul = measured.kind
        console.print(f"base.matmul: auto is {matmul} here ({measured.reason})")
    exact = use_matmul(skeleton, matmul, settings.outlier_threshold)
    if matmul != "dequantize":  # then there is a compiler
        compile_fused_operations(skeleton)
    if exact:
        console.print(
            f"base.matmul: {len(exact)} layer(s) too wide for sums in 32 bits are dequantised "
            f"({exact[0]} and its like)"
        )
    return matmul
