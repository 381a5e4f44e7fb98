"""The base on all ranks: read, quantised, sharded, attached; used by training and generation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from trainer.base.families import family_of
from trainer.base.files import BaseFiles, local_folder, open_base
from trainer.base.loading import LoadStats, load_base
from trainer.base.matmul import MEASURE, largest_shapes, measure, resolve_matmul, use_matmul
from trainer.base.model import PromptedBase
from trainer.base.skeleton import build_skeleton
from trainer.config import Base, RunConfig
from trainer.console import Console
from trainer.engine import Engine, compute_dtype, resolve_policy
from trainer.errors import BadInput
from trainer.placement import Placement


@dataclass(frozen=True)
class LoadedBase:
    """The base on this rank's device, sharded and attached."""

    model: PromptedBase
    stats: LoadStats
    dtype: torch.dtype
    placement: Placement
    matmul: str


def open_files(engine: Engine, settings: Base, console: Console) -> BaseFiles:
    """The base's files, on all ranks. One rank of each node downloads what its cache lacks.

    Raises:
        BadInput: on all ranks, if the files are not there, not supported, or not the same on all.
    """

    def download() -> BaseFiles | None:
        if local_folder(settings) is not None:
            return None
        with console.downloading(settings.model) as progress:
            return open_base(settings, progress=progress)

    downloaded = engine.on_each_node(download)
    files = engine.together(lambda: downloaded or open_base(settings, download=False))
    if len(set(engine.all_gather(files.fingerprint))) > 1:
        raise BadInput(
            f"base.model: {settings.model!r} is not the same on all nodes; name a commit in "
            "base.revision, or copy one folder to all"
        )
    return files


def load(
    engine: Engine,
    files: BaseFiles,
    config: RunConfig,
    console: Console,
    *,
    must_fit: bool = False,
) -> LoadedBase:
    """Read, quantise, shard and attach the base, with a progress bar.

    Args:
        must_fit: refuse a base that does not fit into the memory that is free, instead of trying.
    """
    settings = config.base
    dtype = compute_dtype(settings.dtype, engine.device)
    policy = engine.together(lambda: resolve_policy(config, dtype, files.config.hidden_size))
    setting = config.engine.gradient_checkpointing
    checkpointing = engine.device.type != "cpu" if setting == "auto" else setting
    # All that can be wrong without reading weights is found here, before minutes of reading.
    skeleton = engine.together(lambda: build_skeleton(files, settings, dtype, engine.device))
    matmul = _choose_matmul(engine, settings, skeleton, dtype, console)
    if not family_of(files.config, files.name).packed:
        console.say(
            f"base.model: {files.config.model_type} cannot read packed rows; the rows of a stream "
            "are padded to its longest (slower, and more memory: lower training.micro_batch_tokens "
            "where it runs short)"
        )
    offload = policy["zero_optimization"].get("offload_param", {}).get("device") == "cpu"
    placement = engine.place(skeleton, config, dtype, offload=offload, must_fit=must_fit)
    policy = resolve_policy(config, dtype, files.config.hidden_size, placement)
    share = files.num_bytes // placement.group_size
    with console.loading(f"loading {settings.model}", share) as bar:
        base, stats = load_base(
            skeleton,
            files,
            dtype=dtype,
            device=engine.device,
            shard=engine.sharder(policy, placement.group_size),
            checkpointing=checkpointing,
            progress=bar.advance,
        )
    engine.attach(base, policy, placement.kept_bytes)
    return LoadedBase(base, stats, dtype, placement, matmul)


def _choose_matmul(
    engine: Engine, settings: Base, skeleton: PreTrainedModel, dtype: torch.dtype, console: Console
) -> str:
    """Set how the layers multiply, alike on all ranks: ``base.matmul``, or what rank 0 measured."""
    found = engine.together(
        lambda: resolve_matmul(
            settings.matmul, settings.quantization, engine.device, skeleton.config.hidden_size
        )
    )
    kinds = set(engine.all_gather(found))
    matmul = found if len(kinds) == 1 else "dequantize"  # auto, on devices that are not alike
    if matmul == MEASURE:
        shapes = largest_shapes(skeleton)
        measured = engine.broadcast(
            measure(shapes, dtype, engine.device) if engine.is_main else None
        )
        matmul = measured.kind
        console.say(f"base.matmul: auto is {matmul} here ({measured.reason})")
    exact = use_matmul(skeleton, matmul, settings.outlier_threshold)
    if exact:
        console.say(
            f"base.matmul: {len(exact)} layer(s) too wide for sums in 32 bits are dequantised "
            f"({exact[0]} and its like)"
        )
    return matmul
