"""The simulation of gathers equals closed forms where one resource decides."""

from __future__ import annotations

import pytest

from benchmarks.scaling.gather_simulation import Layer, Task, simulate, step_seconds, step_tasks

LINK = {"link": 100.0}  # bytes per second


def test_a_transfer_takes_its_bytes_over_the_rate_of_the_slowest_resource() -> None:
    spans = simulate([Task(200, ("fast", "slow"))], {"fast": 1000, "slow": 50})
    assert spans == [(0, pytest.approx(4.0))]


def test_transfers_that_overlap_share_a_link_equally() -> None:
    # Alone until 1 s, together until the first ends, alone again: 300 bytes in 3 s in all.
    spans = simulate([Task(200, ("link",)), Task(100, ("link",), delay=1.0)], LINK)
    assert spans[0] == (0, pytest.approx(3.0))
    assert spans[1] == (pytest.approx(1.0), pytest.approx(3.0))


def test_a_task_waits_for_all_tasks_before_it() -> None:
    tasks = [Task(100, ("a",)), Task(300, ("b",)), Task(100, ("a",), (0, 1))]
    spans = simulate(tasks, {"a": 100, "b": 100})
    assert spans[2] == (pytest.approx(3.0), pytest.approx(4.0))


@pytest.mark.parametrize("count", [1, 2, 7])
def test_bound_by_compute_only_the_first_gather_is_exposed(count: int) -> None:
    layers = [Layer(received=50, seconds=2.0)] * count
    assert step_seconds(layers, LINK) == pytest.approx(0.5 + 2.0 * count)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_bound_by_the_link_only_the_last_computation_is_exposed(count: int) -> None:
    layers = [Layer(received=200, seconds=0.5)] * count
    assert step_seconds(layers, LINK) == pytest.approx(2.0 * count + 0.5)


def test_without_prefetching_gathers_and_computations_take_turns() -> None:
    layers = [Layer(received=200, seconds=0.5)] * 5
    assert step_seconds(layers, LINK, window=1) == pytest.approx(5 * (2.0 + 0.5))


def test_without_gathers_a_step_is_its_computations() -> None:
    assert step_seconds([Layer(0, 0.5)] * 4, LINK) == pytest.approx(2.0)
    assert step_seconds([], LINK) == 0.0


def test_groups_of_one_node_share_its_link() -> None:
    layers = [Layer(received=200, seconds=0.1)] * 3
    assert step_seconds(layers, LINK, groups=4) == pytest.approx(4 * 3 * 2.0 + 0.1)


def test_groups_bound_by_compute_do_not_delay_each_other() -> None:
    layers = [Layer(received=10, seconds=5.0)] * 3
    # Both groups' first gathers share the link.
    assert step_seconds(layers, LINK, groups=2) == pytest.approx(0.2 + 3 * 5.0)


def test_every_gather_has_a_latency() -> None:
    layers = [Layer(received=100, seconds=0.0)] * 3
    assert step_seconds(layers, LINK, latency=0.25) == pytest.approx(3 * 1.25)


def test_no_more_layers_than_the_window_are_gathered_at_a_time() -> None:
    layers = [Layer(received=10, seconds=1.0)] * 6
    tasks = step_tasks(layers, "group", ["link"], window=2)
    spans = simulate(tasks, {"group": 1.0} | LINK)
    gathers, computed = spans[::2], spans[1::2]
    for number in range(2, 6):
        assert gathers[number][0] >= computed[number - 2][1]
    assert gathers[1][0] < computed[0][0] + 1e-9  # the second layer while the first computes
