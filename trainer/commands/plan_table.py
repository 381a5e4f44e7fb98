"""The plan of a run as text for people, within 80 columns."""

from __future__ import annotations

from trainer.cost_model.run_plan import Option, RunNeeds, RunPlan
from trainer.runtime.redact import printable

_HEAD = (
    " ranks  ------- GB per device -------         packed    useful          limited\n"
    "/copy    base  kept activ other total  fits   tokens  tokens/s    time  by"
)
_LEGEND = (
    "\nranks/copy: devices that share one copy of the base. kept: layers gathered at a\n"
    "time, or until the step ends. packed tokens: the longest micro-batch."
)


def print_plan(plan: RunPlan, needs: RunNeeds) -> None:
    """Print one line per shard group, and the recommended option in detail."""
    world, nodes = sum(plan.node_sizes), len(plan.node_sizes)
    where = "1 node" if nodes == 1 else f"{nodes} nodes"
    parameters = sum(w.elements for w in (*needs.base.weights, *needs.base.tables))
    memory = (plan.device.memory_bytes + plan.device.context_bytes) / 1e9
    model = printable(needs.config.base.model)
    stored = _number(needs.base.size.total_bytes / 1e9)
    print(f"{model}: {_count(parameters)} parameters, {stored} GB")
    print(f"{world} x {plan.device.name} ({_number(memory)} GB each) on {where}\n")
    print(_HEAD)
    for index, option in enumerate(plan.options):
        mark = "*" if index == plan.recommended else " "
        print(f"{mark}{_line(option)}")
    print(_LEGEND)
    best = plan.options[plan.recommended]
    configured = plan.options[plan.configured]
    print(
        f"\n* engine.shard_group=auto takes {best.shard_group}. The run file's setting "
        f"({needs.config.engine.shard_group}) is {configured.shard_group}."
    )
    _print_details(best)


def _print_details(option: Option) -> None:
    cost, checkpointing = option.cost, "on" if option.budget.checkpointing else "off"
    print(
        f"  a step: {_number(option.step_seconds)} s, {_short(cost.flops)}FLOPs and "
        f"{_number(cost.gathered_bytes / 1e9)} GB gathered per device\n"
        f"  {cost.micro_batches} micro-batch(es), gradient checkpointing {checkpointing}, "
        f"{option.roofline_share:.0%} of the devices' peak"
    )
    phases = ", ".join(f"{name} {_time(s)}" for name, s in option.seconds.items() if s >= 0.5)
    print(f"  {phases}")
    print(
        f"  {_number(option.hours)} h, {_number(option.hours * option.world_size)} device-hours; "
        f"Slurm: --time {option.limit}"
    )


def _line(option: Option) -> str:
    parts = option.bytes
    others = parts.head + parts.prompts + parts.other
    sizes = (parts.base_shard, parts.gathered, parts.activations, others, parts.total)
    columns = " ".join(f"{_gb(size):>5}" for size in sizes)
    return (
        f"{option.shard_group:>4}  {columns:>29}  {'yes' if option.fits else 'NO':>4} "
        f"{option.budget.tokens:>8,} {option.useful_tokens_per_second:>9,.0f} "
        f"{_time(3600 * option.hours):>7}  {option.limited_by.removesuffix(' fabric')}"
    )


def _number(value: float) -> str:
    """Three digits, without exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _count(number: float) -> str:
    return (
        f"{_number(number / 1e9)} billion" if number >= 1e9 else f"{_number(number / 1e6)} million"
    )


def _gb(num_bytes: int) -> str:
    value = num_bytes / 1e9
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.3f}"


def _short(number: float) -> str:
    for unit in ("", "k", "M", "G", "T", "P"):
        if abs(number) < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} E"


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
