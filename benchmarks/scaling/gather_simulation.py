"""Discrete-event simulation of one step whose layers are gathered ahead of their computation.

A task takes a share of its resources until its work is done. Tasks that use a resource at the same
time share its rate equally. ``step_tasks`` writes the schedule of ZeRO-3 as such tasks: one
all-gather at a time per shard group, layer by layer, at most ``WINDOW`` layers ahead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

#: Layers that are gathered at a time: one computed, one prefetched.
WINDOW = 2
#: Share of a task's work that counts as done, because rates are floating-point numbers.
_DONE = 1e-9


@dataclass(frozen=True)
class Task:
    """One computation or transfer.

    Attributes:
        work: in the unit of the resources' rates times seconds: bytes, or seconds of computing.
        resources: names of the resources that the task uses together; the slowest one limits it.
        after: indices of earlier tasks that must have ended.
        delay: seconds after the last of them, before the work begins.
    """

    work: float
    resources: tuple[str, ...]
    after: tuple[int, ...] = ()
    delay: float = 0.0


def simulate(tasks: Sequence[Task], rates: Mapping[str, float]) -> list[tuple[float, float]]:
    """Return start and end of each task in seconds.

    Args:
        rates: of each resource, per second.
    """
    followers: list[list[int]] = [[] for _ in tasks]
    waits = [len(task.after) for task in tasks]
    for index, task in enumerate(tasks):
        for before in task.after:
            assert before < index, "tasks are ordered"
            followers[before].append(index)
    spans = [(0.0, 0.0)] * len(tasks)
    left = [task.work for task in tasks]
    begins = {i: task.delay for i, task in enumerate(tasks) if not task.after}
    running: list[int] = []
    now = 0.0
    while begins or running:
        speeds = _speeds(tasks, running, rates)
        ends = [now + left[i] / speeds[i] for i in running]
        then = min([*ends, *begins.values()])
        for i in running:
            left[i] -= speeds[i] * (then - now)
        now = then
        ended = [i for i in running if left[i] <= _DONE * tasks[i].work]
        running = [i for i in running if i not in ended]
        for i in [i for i, begin in begins.items() if begin <= now]:
            del begins[i]
            spans[i] = (now, now)
            (running if tasks[i].work > 0 else ended).append(i)
        for i in ended:
            spans[i] = (spans[i][0], now)
            for follower in followers[i]:
                waits[follower] -= 1
                if not waits[follower]:
                    begins[follower] = now + tasks[follower].delay
    return spans


def _speeds(
    tasks: Sequence[Task], running: Sequence[int], rates: Mapping[str, float]
) -> dict[int, float]:
    users: dict[str, int] = {}
    for i in running:
        for name in tasks[i].resources:
            users[name] = users.get(name, 0) + 1
    return {i: min(rates[name] / users[name] for name in tasks[i].resources) for i in running}


@dataclass(frozen=True)
class Layer:
    """One layer in one pass: bytes to receive, seconds to compute, in order of computation."""

    received: float
    seconds: float


def step_tasks(
    layers: Sequence[Layer],
    group: str,
    links: Sequence[str],
    *,
    window: int = WINDOW,
    latency: float = 0.0,
    first: int = 0,
) -> list[Task]:
    """Return the tasks of one shard group in a step.

    Layers that are not received, because they are still gathered, have no transfer.

    Args:
        layers: all passes of the step, forward and backward.
        group: name of the group's own resource of rate 1, on which it computes.
        links: resources of a transfer.
        window: layers that may be gathered at a time.
        latency: seconds of an all-gather that do not depend on its bytes.
        first: index of the first of these tasks in the list that will be simulated.
    """
    tasks: list[Task] = []
    computed: list[int] = []
    transfer: int | None = None
    for number, layer in enumerate(layers):
        needs = computed[-1:]
        if layer.received > 0:
            before = [] if transfer is None else [transfer]
            if number >= window:
                before.append(computed[number - window])
            tasks.append(Task(layer.received, tuple(links), tuple(before), latency))
            transfer = first + len(tasks) - 1
            needs = [*needs, transfer]
        tasks.append(Task(layer.seconds, (group,), tuple(needs)))
        computed.append(first + len(tasks) - 1)
    return tasks


def step_seconds(
    layers: Sequence[Layer],
    rates: Mapping[str, float],
    *,
    groups: int = 1,
    window: int = WINDOW,
    latency: float = 0.0,
) -> float:
    """Return the seconds of a step of ``groups`` shard groups that share every resource of a node.

    Args:
        layers: passes of one group; all groups compute the same.
        rates: bytes per second of the links that the groups share.
    """
    tasks: list[Task] = []
    for group in range(groups):
        tasks += step_tasks(
            layers, f"group {group}", list(rates), window=window, latency=latency, first=len(tasks)
        )
    devices = {f"group {group}": 1.0 for group in range(groups)}
    return max((end for _, end in simulate(tasks, devices | dict(rates))), default=0.0)
