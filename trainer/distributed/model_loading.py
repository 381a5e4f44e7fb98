"""Open, fingerprint and load the base on all ranks: quantized, sharded, attached to ZeRO-3."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from trainer.config import Base, RunConfig
from trainer.distributed.deepspeed_config import resolve_policy
from trainer.distributed.deepspeed_engine import Engine, compute_dtype
from trainer.distributed.placement import LEAST_SHARED_BYTES, Placement
from trainer.model.attention.interface import resolve_attention
from trainer.model.base_tokenizer import local_path
from trainer.model.checkpoint_files import BaseFiles, open_base
from trainer.model.families import family_of, layer_sizes
from trainer.model.fingerprint import combine_digests, digest_weight_files
from trainer.model.layers.fused_ops import compile_fused_operations, fused_counts
from trainer.model.layers.matmul_selection import (
    MEASURE,
    candidates,
    check_product,
    largest_shapes,
    measure,
    resolve_matmul,
    unsupported_device,
    use_matmul,
)
from trainer.model.meta_model import build_meta_model
from trainer.model.per_layer_inputs import id_rules
from trainer.model.prompted_model import PromptedBase
from trainer.model.shard_loading import LoadStats, load_shards
from trainer.packing.activation_memory import BatchMemory, TokenBudget
from trainer.packing.run_budget import run_budget
from trainer.runtime.console import Console
from trainer.runtime.errors import BadInput

#: Size of a base whose digests take several seconds.
SLOW_DIGEST_BYTES = 5_000_000_000


@dataclass(frozen=True)
class LoadedBase:
    """The sharded and attached base of this rank, and the settings chosen while loading it."""

    model: PromptedBase
    stats: LoadStats
    dtype: torch.dtype
    placement: Placement
    matmul: str
    memory: BatchMemory
    budget: TokenBudget


def open_base_on_all(engine: Engine, settings: Base, console: Console) -> BaseFiles:
    """Open the base's files on all ranks; one rank of each node downloads missing files.

    Raises:
        BadInput: on all ranks, if the files are missing, not supported, or differ between nodes.
    """

    def download() -> BaseFiles | None:
        if local_path(settings) is not None:
            return None
        with console.downloading(settings.model) as progress:
            return open_base(settings, progress=progress)

    downloaded = engine.run_on_each_node(download)
    files = engine.run_on_all(lambda: downloaded or open_base(settings, download=False))
    for warning in files.parameters.warnings:
        console.warn(warning)
    if len(set(engine.all_gather(files.fingerprint))) > 1:
        raise BadInput(
            f"base.model: {settings.model!r} is not the same on all nodes; set "
            "base.revision to a commit, or copy one folder to all nodes"
        )
    return files


def fingerprint_base_on_all(engine: Engine, files: BaseFiles, console: Console) -> dict[str, str]:
    """Compute the digests of the base's files; the weight files are divided among the ranks."""
    if files.num_bytes >= SLOW_DIGEST_BYTES:
        size = f"{files.num_bytes / 1e9:,.0f} GB"
        console.print(f"hashing the base's files ({size}; cached until they change)")
    mine = files.weight_files[engine.rank :: engine.world_size]
    digests: dict[str, str] = {}
    for part in engine.run_and_gather(lambda: digest_weight_files(mine)):
        digests |= part
    return combine_digests(files, digests)


def load_base(
    engine: Engine,
    files: BaseFiles,
    config: RunConfig,
    console: Console,
    *,
    must_fit: bool = False,
    lengths: Sequence[int] = (),
    kept_bytes: int | None = None,
    only_inference: bool = False,
) -> LoadedBase:
    """Read, quantize, shard and attach the base, with a progress bar.

    Args:
        must_fit: as in ``Engine.place``.
        lengths: number of tokens of each training row, or of a sample; empty without training.
        kept_bytes: maximum bytes of parameters that stay gathered until a step ends; None: as many
            as fit.
        only_inference: as in ``Engine.attach``. Other products and attention are used than those of
            the run if this machine does not support them: it may not be the one that trained.
    """
    if only_inference:
        config = _supported(engine, config, console)
    settings = config.base
    dtype = compute_dtype(settings.dtype, engine.device)
    policy = engine.run_on_all(lambda: resolve_policy(config, dtype, files.config.hidden_size))
    # Detects all problems that do not depend on weights, before minutes of reading.
    model = engine.run_on_all(lambda: build_meta_model(files, settings, dtype, engine.device))
    if fused := fused_counts(model):
        counts = ", ".join(f"{count} {operation}" for operation, count in sorted(fused.items()))
        console.detail(f"fused operations: {counts}")
    matmul = _choose_matmul(engine, settings, model, dtype, console, only_inference)
    packed = family_of(files.config, files.name).packed
    flex = engine.run_on_all(
        lambda: resolve_attention(config.engine.attention, engine.device, packed)
    )
    if not packed:
        console.print(
            f"base.model: {files.config.model_type} does not support packed rows; the rows of a "
            "batch are padded to the longest (slower, and needs more memory; if it runs out, lower "
            "training.micro_batch_tokens)"
        )
    padding = id_rules(files.config).padding
    if padding is not None:
        console.print(
            f"base.model: the layers of {files.config.model_type} read inputs by token id; virtual "
            f"tokens get those of the padding token ({padding})"
        )
    offload = policy["zero_optimization"].get("offload_param", {}).get("device") == "cpu"
    placement = engine.place(model, config, dtype, offload=offload, must_fit=must_fit)
    if kept_bytes is not None and kept_bytes < placement.kept_bytes:
        placement = replace(placement, kept_bytes=kept_bytes)
    policy = resolve_policy(config, dtype, files.config.hidden_size, placement)
    memory, budget = run_budget(
        config,
        layer_sizes(files.config),
        lengths,
        vocab_size=files.config.vocab_size,
        world_size=engine.world_size,
        itemsize=dtype.itemsize,
        left_bytes=placement.left_bytes,
        packed=packed,
        on_cpu=engine.device.type == "cpu",
    )
    if lengths:
        console.detail(budget.description)
    share = files.num_bytes // placement.group_size
    with console.loading(f"loading {settings.model}", share) as bar:
        base, stats = load_shards(
            model,
            files,
            dtype=dtype,
            device=engine.device,
            sharder=engine.sharder(
                policy,
                placement.group_size,
                share_memory=files.num_bytes >= LEAST_SHARED_BYTES,
            ),
            checkpointing=budget.checkpointing,
            progress=bar.advance,
        )
    base.flex = flex
    engine.attach(base, policy, placement.kept_bytes, only_inference=only_inference)
    return LoadedBase(base, stats, dtype, placement, matmul, memory, budget)


def _supported(engine: Engine, config: RunConfig, console: Console) -> RunConfig:
    """Replace products and attention that a rank does not support by ``auto``."""

    def problem(resolve: Callable[[], object]) -> str:
        try:
            resolve()
        except BadInput as error:
            return error.problems[0]
        return ""

    base, device = config.base, engine.device
    own = (
        problem(lambda: resolve_matmul(base.matmul, base.quantization, device, 0)),
        problem(lambda: resolve_attention(config.engine.attention, device, packed=True)),
    )
    matmul, attention = (
        next(filter(None, problems), "") for problems in zip(*engine.all_gather(own), strict=True)
    )
    for text in filter(None, (matmul, attention)):
        console.warn(f"{text.rpartition('; ')[0]}; using auto")
    changes: dict[str, Any] = {}
    if matmul:
        changes["base"] = base.model_copy(update={"matmul": "auto"})
    if attention:
        changes["engine"] = config.engine.model_copy(update={"attention": "auto"})
    return config.model_copy(update=changes)


def _choose_matmul(
    engine: Engine,
    settings: Base,
    model: PreTrainedModel,
    dtype: torch.dtype,
    console: Console,
    only_inference: bool,
) -> str:
    """Set the product of int8 layers: ``base.matmul``, or the fastest as measured on rank 0."""
    resolved = engine.run_on_all(
        lambda: resolve_matmul(
            settings.matmul, settings.quantization, engine.device, model.config.hidden_size
        )
    )
    kinds = set(engine.all_gather(resolved))
    matmul = resolved if len(kinds) == 1 else "dequantize"  # auto, on different devices
    shapes = largest_shapes(model)
    if matmul == MEASURE:
        with console.phase("measuring int8 products (base.matmul: auto)"):
            every_rank = engine.all_gather(candidates())
            shared = [kind for kind in every_rank[0] if all(kind in rank for rank in every_rank)]
            measured = engine.run_on_main(
                lambda: measure(shared, shapes, dtype, engine.device, settings.outlier_threshold)
            )
        matmul = measured.kind
        untimed = "" if "bitsandbytes" in shared else "; bitsandbytes cannot be imported"
        console.detail(f"base.matmul: auto is {matmul} here ({measured.reason}{untimed})")
    elif matmul != "dequantize" and engine.device.type == "cuda":
        with console.phase(f"compiling int8 products (base.matmul: {matmul})"):
            matmul = _checked(engine, settings, matmul, shapes, dtype, console, only_inference)
    elif (
        settings.matmul == "auto"
        and settings.quantization == "int8"
        and (unsupported := unsupported_device(engine.device))
    ):
        console.detail(f"base.matmul: auto is {matmul} on {unsupported}")
    exact = use_matmul(model, matmul, settings.outlier_threshold)
    if matmul != "dequantize":  # all others have required a compiler already
        compile_fused_operations(model)
    if exact:
        console.print(
            f"base.matmul: {len(exact)} layer(s) too wide for 32-bit sums are dequantized "
            f"(such as {exact[0]})"
        )
    return matmul


def _checked(
    engine: Engine,
    settings: Base,
    matmul: str,
    shapes: Sequence[tuple[int, int]],
    dtype: torch.dtype,
    console: Console,
    only_inference: bool,
) -> str:
    """Return the product if it works on all ranks; for inference, else ``dequantize``."""
    threshold = settings.outlier_threshold
    try:
        engine.run_on_all(lambda: check_product(matmul, shapes, dtype, engine.device, threshold))
    except BadInput as error:
        if not only_inference:
            raise
        console.warn(f"{error.problems[0].rpartition('; ')[0]}; using dequantize")
        return "dequantize"
    return matmul
