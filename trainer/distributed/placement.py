"""How many ranks share one copy of the base, and how much of it may stay gathered. No torch.

Both follow from sizes and from one memory budget. A rank needs its shard, and room for the layer
at work and the one that is fetched at that time. What the budget has left keeps gathered parameters
until the step ends, so that they are fetched once per step and not twice per micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.runtime.errors import BadInput

#: Share of the free memory that ``engine.base_memory: auto`` takes; the rest is for activations.
AUTO_SHARE = 0.5
#: Layers that are whole on a rank at the same time: one at work, one being fetched.
LAYERS_AT_WORK = 2


@dataclass(frozen=True)
class BaseSize:
    """Of the base as it will be stored.

    Attributes:
        total_bytes: of all that is shared out over the ranks.
        layer_bytes: of the largest unit that is gathered: a layer, the head, or another parameter.
        layer_elements: the same, of what ZeRO-3 gathers: all but the head.
        looked_up_bytes: of the total, what is read by the row and never gathered.
    """

    total_bytes: int
    layer_bytes: int
    layer_elements: int
    looked_up_bytes: int = 0


@dataclass(frozen=True)
class Placement:
    """Where the base lies.

    Attributes:
        group_size: ranks that hold one copy together; groups are of consecutive ranks.
        kept_bytes: of gathered parameters that may stay on a rank until the step ends.
        left_bytes: of a rank's device that the base will leave free.
    """

    group_size: int
    kept_bytes: int
    layer_elements: int
    left_bytes: int = 0

    @property
    def policy(self) -> dict[str, int]:
        """DeepSpeed's own limits, in elements, for all that is not kept.

        The reuse distance spans a layer twice: recomputed in backward, it is not fetched again.
        """
        return {
            "stage3_prefetch_bucket_size": self.layer_elements,
            "stage3_max_reuse_distance": 2 * self.layer_elements,
            "stage3_max_live_parameters": self.kept_bytes
            + 2 * LAYERS_AT_WORK * self.layer_elements,
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
) -> Placement:
    """Choose the shard group and what is kept.

    Args:
        shard_group: ``engine.shard_group``.
        memory: bytes of a rank's device that the base may take.
        node_sizes: ranks on each node, in rank order.
        free: bytes of that device that are free, the base not yet there; None: ``memory``.
        offload: shards lie in host memory and do not count.
        exact: the memory is the user's own number, so what does not fit is refused.

    Raises:
        BadInput: if the group does not divide the ranks, or the base does not fit.
    """
    world = sum(node_sizes)
    group_size = _group_size(size, shard_group, memory, node_sizes, offload)
    needed = _needed(size, group_size, offload)
    if exact and needed > memory:
        raise BadInput(
            f"engine.base_memory: {memory / 1e9:.2f} GB is too little: with {group_size} of "
            f"{world} ranks to a copy, the shard and {LAYERS_AT_WORK} layers take "
            f"{needed / 1e9:.2f} GB; give more, use more ranks or ds_configs/zero3_offload_cpu.json"
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
                "engine.shard_group: node needs as many ranks on every node, but there are "
                f"{', '.join(map(str, node_sizes))}; use world or auto"
            )
        return node
    if setting == "auto":
        # Shards on the host are one copy for all, whose size no device limits.
        fitting = [g for g in _groups(world, node, even) if _needed(size, g, offload) <= memory]
        return world if offload or not fitting else fitting[0]
    group_size = int(setting)
    if world % group_size:
        possible = ", ".join(str(g) for g in range(1, world + 1) if world % g == 0)
        raise BadInput(
            f"engine.shard_group: {group_size} does not divide the {world} ranks of this run; "
            f"use one of {possible}, or auto, world, node"
        )
    return group_size


def _groups(world: int, node: int, even: bool) -> list[int]:
    """Group sizes, smallest first, that lie inside a node or are made of whole nodes."""
    if not even:
        return [1, world]
    return [g for g in range(1, world + 1) if world % g == 0 and (node % g == 0 or g % node == 0)]


def _needed(size: BaseSize, group_size: int, offload: bool) -> int:
    """Bytes without which a rank cannot run."""
    shard = 0 if offload else -(-size.total_bytes // group_size)
    return shard + (0 if group_size == 1 and not offload else LAYERS_AT_WORK * size.layer_bytes)
