"""Where the base lies follows from sizes and one memory budget."""

from __future__ import annotations

import pytest

from trainer.distributed.placement import BaseSize, Placement, place
from trainer.runtime.errors import BadInput

GB = 10**9
SIZE = BaseSize(total_bytes=70 * GB, layer_bytes=1 * GB, layer_elements=GB)
TWO_NODES = [8, 8]


def group(setting: int | str, memory: int, nodes: list[int], **options: bool) -> Placement:
    return place(SIZE, setting, memory * GB, nodes, **options)


@pytest.mark.parametrize(
    ("memory", "ranks"),
    [(70, 1), (69, 2), (37, 2), (36, 4), (20, 4), (12, 8), (7, 16)],
)
def test_auto_shards_only_as_far_as_needed(memory: int, ranks: int) -> None:
    assert group("auto", memory, TWO_NODES).group_size == ranks


def test_auto_takes_all_ranks_where_nothing_fits() -> None:
    assert group("auto", 3, TWO_NODES).group_size == 16


def test_auto_keeps_groups_inside_nodes() -> None:
    assert group("auto", 20, [6, 6]).group_size == 6  # 4 would lie across two nodes
    assert group("auto", 37, [2, 4]).group_size == 6


def test_auto_stays_inside_a_node_where_activations_still_fit() -> None:
    nodes = [8, 8]  # shard and two layers take 10.75 GB in a node, 6.4 GB in two

    def chosen(free: float, *, flexible: bool) -> int:
        memory = int(free * GB / 2)
        free_bytes = int(free * GB)
        return place(SIZE, "auto", memory, nodes, free=free_bytes, flexible=flexible).group_size

    assert chosen(15, flexible=False) == 16
    assert chosen(15, flexible=True) == 8
    assert chosen(13, flexible=True) == 16  # 0.8 of 13 GB is too little
    left = place(SIZE, "auto", 7 * GB, nodes, free=15 * GB, flexible=True, exact=True).left_bytes
    assert left == 15 * GB - 2 * GB - 70 * GB // 8


def test_node_and_world() -> None:
    assert group("node", 80, TWO_NODES).group_size == 8
    assert group("world", 80, TWO_NODES).group_size == 16
    with pytest.raises(BadInput, match=r"node requires the same number of ranks .* 4, 8"):
        group("node", 80, [4, 8])


def test_a_number_must_divide_the_ranks() -> None:
    assert group(4, 80, TWO_NODES).group_size == 4
    with pytest.raises(BadInput, match=r"5 does not divide the 16 ranks.*one of 1, 2, 4, 8, 16"):
        group(5, 80, TWO_NODES)


def test_the_remaining_budget_keeps_layers_gathered() -> None:
    assert group("world", 7, [16]).kept_bytes == 625_000_000  # 7 - 70/16 - two layers
    assert group("world", 4, [16]).kept_bytes == 0
    assert group("world", 200, [16]).kept_bytes == 70 * GB
    assert group(1, 200, [16]).kept_bytes == 0  # nothing is gathered
    assert group("world", 10, [16], offload=True).kept_bytes == 8 * GB


def test_exchanged_tables_count_at_rest_but_are_never_kept() -> None:
    size = BaseSize(70 * GB, 1 * GB, GB, looked_up_bytes=2 * GB)
    assert place(size, "world", 200 * GB, [16]).kept_bytes == 68 * GB
    assert place(size, "world", 7 * GB, [16]).kept_bytes == 625_000_000
    with pytest.raises(BadInput, match="is too little"):
        place(size, "world", 6 * GB, [16], exact=True)


def test_limits_are_two_layers_beside_what_is_kept() -> None:
    policy = group("world", 7, [16]).policy
    assert policy["stage3_prefetch_bucket_size"] == GB
    assert policy["stage3_max_reuse_distance"] == 2 * GB
    assert policy["stage3_max_live_parameters"] == 2 * GB


def test_a_base_larger_than_the_memory_of_all_gpus_is_refused() -> None:
    """On a CPU, memory that is missing may be swapped."""
    nodes, few, enough = [2], 35 * GB, 36 * GB  # the shard takes 35 GB, a layer 1 GB
    assert place(SIZE, "auto", few // 2, nodes, free=few).group_size == 2
    with pytest.raises(BadInput, match=r"does not fit into 35.00 GB.*2 of 2 .*at least 36.00 GB"):
        place(SIZE, "auto", few // 2, nodes, free=few, hard_limit=True)
    with pytest.raises(BadInput, match="does not fit into"):  # whatever engine.base_memory promises
        place(SIZE, "auto", 80 * GB, nodes, free=few, hard_limit=True)
    assert place(SIZE, "auto", few, nodes, free=enough, hard_limit=True).group_size == 2
    assert place(SIZE, 1, few, nodes, free=3 * GB, offload=True, hard_limit=True).group_size == 1


def test_a_budget_that_is_too_small_is_refused() -> None:
    with pytest.raises(BadInput, match=r"base_memory: 6.00 GB is too little: with 16 of 16 ranks"):
        group("world", 6, TWO_NODES, exact=True)
    assert group("world", 6, TWO_NODES, exact=True, offload=True).kept_bytes == 4 * GB
