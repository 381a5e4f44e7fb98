"""Choose the shard group, and how many bytes of the base stay gathered.

Both follow from the sizes of the base and one memory budget. A rank needs memory for its shard, the
layer being computed and the layer being prefetched. In the remaining memory, parameters stay
gathered until the step ends: they are gathered once per step instead of twice per micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.runtime.errors import BadInput

#: Share of free memory for the base if ``engine.base_memory`` is auto; activations use the rest.
AUTO_SHARE = 0.5
#: Share of free memory that the base may take if that keeps a shard group inside a node.
NODE_SHARE = 0.8
#: Layers that are gathered on a rank at the same time, without kept ones: one computed, one
#: prefetched. ``Placement.policy`` is the limit, for layers that are gathered as a whole.
LIVE_LAYERS = 2
#: Bytes of the files of a base that CPU ranks of one node gather from shared memory. Smaller bases
#: are gathered by collectives as on GPUs, so that tests on a CPU run these.
LEAST_SHARED_BYTES = 1_000_000_000


@dataclass(frozen=True)
class BaseSize:
    """Sizes of the base as it will be stored.

    Attributes:
        total_bytes: of all sharded parameters.
        layer_bytes: of the largest unit that is gathered: a layer, the head, or another parameter.
        layer_elements: of the largest unit that ZeRO-3 gathers, which excludes the head.
        looked_up_bytes: of an untied embedding table, which is never gathered; part of the total.
    """

    total_bytes: int
    layer_bytes: int
    layer_elements: int
    looked_up_bytes: int = 0


@dataclass(frozen=True)
class Placement:
    """How the base is distributed over the ranks.

    Attributes:
        group_size: number of consecutive ranks that hold one copy.
        kept_bytes: of gathered parameters that may stay on a rank until the step ends.
        layer_elements: as in ``BaseSize``.
        left_bytes: free bytes of a rank's device after the base is loaded.
    """

    group_size: int
    kept_bytes: int
    layer_elements: int
    left_bytes: int = 0

    @property
    def policy(self) -> dict[str, int]:
        """DeepSpeed's limits, in elements, for parameters that are not kept.

        The reuse distance is two layers, so that a layer recomputed in backward is still gathered.
        """
        return {
            "stage3_prefetch_bucket_size": self.layer_elements,
            "stage3_max_reuse_distance": 2 * self.layer_elements,
            "stage3_max_live_parameters": LIVE_LAYERS * self.layer_elements,
        }


def place(
    size: BaseSize,
    shard_group: int | str,
    memory: int,
    node_sizes: Sequence[int],
    *,
    free: int | None = None,
    offload: bool = False,
    exact: bool = False,
    flexible: bool = False,
    hard_limit: bool = False,
) -> Placement:
    """Choose the shard group and the bytes that stay gathered.

    Args:
        memory: bytes of a rank's device that the base may use.
        node_sizes: ranks on each node, in rank order.
        free: free bytes of the device before the base is loaded; None: ``memory``.
        offload: shards are in host memory and do not count.
        exact: refuse a base that does not fit into ``memory``.
        flexible: ``engine.base_memory`` is auto. Then group size auto may exceed ``memory``, up to
            ``NODE_SHARE`` of ``free``, where a larger group would consist of several nodes: fabrics
            inside a node are several times faster than networks.
        hard_limit: nothing beyond ``free`` can be allocated, as on a GPU: refuse a base whose shard
            and largest layer take more.

    Raises:
        BadInput: if the group does not divide the ranks, or the base does not fit.
    """
    world = sum(node_sizes)
    group_size = _group_size(size, shard_group, memory, node_sizes, offload)
    if shard_group == "auto" and flexible and group_size > node_sizes[0]:
        most = int(NODE_SHARE * (memory if free is None else free))
        inside = [g for g in sensible_groups(node_sizes) if g <= node_sizes[0]]
        if needed_bytes(size, inside[-1], offload=offload) <= most:
            group_size, memory = inside[-1], max(memory, needed_bytes(size, inside[-1]))
    needed = needed_bytes(size, group_size, offload=offload)
    if exact and needed > memory:
        raise BadInput(
            f"engine.base_memory: {memory / 1e9:.2f} GB is too little: with {group_size} of "
            f"{world} ranks per copy, the shard and {LIVE_LAYERS} layers need "
            f"{needed / 1e9:.2f} GB; raise it, use more ranks or ds_configs/zero3_offload_cpu.json"
        )
    least = 0 if offload else -(-size.total_bytes // group_size)
    least += 0 if group_size == 1 and not offload else size.layer_elements  # a byte each, or more
    if hard_limit and free is not None and least > free:
        raise BadInput(
            f"base.model: does not fit into {free / 1e9:.2f} GB of free GPU memory: with "
            f"{group_size} of {world} ranks per copy, the shard and one layer need at least "
            f"{least / 1e9:.2f} GB; use more GPUs or "
            "engine.deepspeed=ds_configs/zero3_offload_cpu.json"
        )
    kept = 0 if group_size == 1 and not offload else max(0, memory - needed)
    kept = min(kept, size.total_bytes - size.looked_up_bytes)
    left = max(0, (memory if free is None else free) - needed - kept)
    return Placement(group_size, kept, size.layer_elements, left)


def _group_size(
    size: BaseSize, setting: int | str, memory: int, node_sizes: Sequence[int], offload: bool
) -> int:
    world, node = sum(node_sizes), node_sizes[0]
    even = len(set(node_sizes)) == 1
    if setting == "world":
        return world
    if setting == "node":
        if not even:
            raise BadInput(
                "engine.shard_group: node requires the same number of ranks on every node, not "
                f"{', '.join(map(str, node_sizes))}; use world or auto"
            )
        return node
    if setting == "auto":
        # Offloaded shards do not use device memory, so one copy is divided among all ranks.
        groups = sensible_groups(node_sizes)
        fitting = [g for g in groups if needed_bytes(size, g, offload=offload) <= memory]
        return world if offload or not fitting else fitting[0]
    group_size = int(setting)
    if world % group_size:
        possible = ", ".join(str(g) for g in range(1, world + 1) if world % g == 0)
        raise BadInput(
            f"engine.shard_group: {group_size} does not divide the {world} ranks of this run; "
            f"use one of {possible}, or auto, world, node"
        )
    return group_size


def sensible_groups(node_sizes: Sequence[int]) -> list[int]:
    """Sizes of shard groups that divide a node or consist of full nodes, ascending."""
    world, node = sum(node_sizes), node_sizes[0]
    if len(set(node_sizes)) > 1:
        return sorted({1, world})
    sizes = [g for g in range(1, world + 1) if world % g == 0]
    return [g for g in sizes if node % g == 0 or g % node == 0]


def needed_bytes(size: BaseSize, group_size: int, *, offload: bool = False) -> int:
    """Minimum bytes of a rank's device: its shard and the layers that are gathered at a time."""
    shard = 0 if offload else -(-size.total_bytes // group_size)
    return shard + (0 if group_size == 1 and not offload else LIVE_LAYERS * size.layer_bytes)
