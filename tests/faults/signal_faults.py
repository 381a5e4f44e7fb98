"""Which tests stand for which fault of signals and lost ranks."""

from __future__ import annotations

_SIGNALS = "tests/faults/test_signals.py"
_LOOP = "tests/unit/test_loop.py"

#: By the number of the fault: what it is, and the tests.
FAULTS: dict[int, tuple[str, tuple[str, ...]]] = {
    1: ("kill -9 of a rank in a step", (f"{_SIGNALS}::test_a_killed_rank_is_named_and_ends_all",)),
    3: ("SIGTERM to one rank", (f"{_SIGNALS}::test_a_signal_to_one_rank_saves_and_stops_all",)),
    4: (
        "SIGUSR1 to the batch shell",
        ("tests/slurm/test_training.py::test_a_job_goes_on_over_its_time_limits",),
    ),
    5: (
        "a second signal while saving",
        (f"{_SIGNALS}::test_a_signal_to_one_rank_saves_and_stops_all",),
    ),
    6: (
        "a signal during evaluation, load, and the first step",
        (
            f"{_SIGNALS}::test_a_signal_while_the_base_is_loaded",
            f"{_LOOP}::test_a_run_told_to_stop_saves_and_goes_on_as_if_it_had_not_been",
        ),
    ),
}
