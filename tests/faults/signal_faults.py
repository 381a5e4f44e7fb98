"""Which tests stand for which fault of signals and lost ranks."""

from __future__ import annotations

_SIGNALS = "tests/faults/test_signals.py"
_LOOP = "tests/unit/test_loop.py"
_SLURM = "tests/slurm/test_training.py"
_WATCHDOG = "tests/unit/test_watchdog.py"

#: By the number of the fault: what it is, and the tests.
FAULTS: dict[int, tuple[str, tuple[str, ...]]] = {
    1: (
        "kill -9 of a rank in a step",
        (
            f"{_SIGNALS}::test_lost_ranks_are_named_and_a_restart_is_bounded",
            f"{_SIGNALS}::test_in_the_end_it_equals_a_run_that_was_left_alone",
        ),
    ),
    3: ("SIGTERM to one rank", (f"{_SIGNALS}::test_a_signal_to_one_rank_saves_and_stops_all",)),
    4: (
        "SIGUSR1 to the batch shell",
        (
            f"{_SLURM}::test_a_run_that_was_stopped_four_times_equals_one_that_was_not",
            f"{_SLURM}::test_every_session_says_what_it_did",
        ),
    ),
    5: (
        "a second signal while saving",
        (f"{_SIGNALS}::test_a_signal_to_one_rank_saves_and_stops_all",),
    ),
    6: (
        "a signal during evaluation, load, and the first step",
        (
            f"{_SIGNALS}::test_a_signal_to_one_rank_while_the_base_is_loaded",
            f"{_LOOP}::test_a_run_told_to_stop_saves_and_goes_on_as_if_it_had_not_been",
        ),
    ),
    7: (
        "SIGSTOP of a rank",
        (
            f"{_SIGNALS}::test_lost_ranks_are_named_and_a_restart_is_bounded",
            f"{_WATCHDOG}::test_a_rank_without_beats_is_named_with_the_step_and_the_collective",
            f"{_WATCHDOG}::test_a_rank_that_beats_but_does_not_come_is_named_as_behind",
        ),
    ),
}
