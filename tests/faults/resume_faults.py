"""Which tests stand for which fault of checkpoints, resume, the lock, and what is refused."""

from __future__ import annotations

_CHECKPOINT = "tests/unit/test_checkpoint.py"
_RESUME = "tests/faults/test_resume.py"
_REFUSED = "tests/faults/test_refused.py"
_IDENTITY = "tests/faults/test_identity.py"

#: By the number of the fault: what it is, and the tests.
FAULTS: dict[int, tuple[str, tuple[str, ...]]] = {
    2: (
        "kill -9 during a save, at each stage of writing",
        (
            f"{_CHECKPOINT}::test_killed_at_every_stage",
            f"{_CHECKPOINT}::test_leftovers_of_a_crash",
        ),
    ),
    8: (
        "the disk is full at a save",
        (
            f"{_RESUME}::test_one_rank_goes_on_from_two_and_a_full_disk_is_no_reason_to_stop",
            f"{_RESUME}::test_a_full_disk_under_the_curves_is_said_once",
            f"{_CHECKPOINT}::test_disk_full_leaves_the_old_one",
        ),
    ),
    9: (
        "the output folder is read-only",
        (f"{_REFUSED}::test_a_read_only_folder_fails_before_the_base_is_looked_for",),
    ),
    10: (
        "the newest checkpoint is cut short",
        (
            f"{_RESUME}::test_broken_checkpoints_are_passed_over_aloud",
            f"{_CHECKPOINT}::test_broken_one_is_passed_over",
        ),
    ),
    11: (
        "a bit of a checkpoint is flipped",
        (
            f"{_RESUME}::test_broken_checkpoints_are_passed_over_aloud",
            f"{_CHECKPOINT}::test_every_flipped_bit_is_seen",
        ),
    ),
    12: (
        "what points to the newest checkpoint is missing or garbled",
        (
            f"{_RESUME}::test_broken_checkpoints_are_passed_over_aloud",
            f"{_CHECKPOINT}::test_never_a_silent_fresh_start",
            f"{_IDENTITY}::test_a_run_whose_checkpoints_are_gone_says_so",
        ),
    ),
    13: (
        "resumed on two ranks instead of one, and on one instead of two",
        (
            f"{_RESUME}::test_two_ranks_go_on_from_one",
            f"{_RESUME}::test_one_rank_goes_on_from_two_and_a_full_disk_is_no_reason_to_stop",
        ),
    ),
    14: (
        "resumed in mid-epoch and mid-accumulation",
        (
            f"{_RESUME}::test_a_killed_run_goes_on_as_if_it_had_not_been",
            "tests/distributed/test_run.py::test_resumed_equals_uninterrupted",
        ),
    ),
    15: (
        "resumed over another base, tokenizer, dtype, length, template or method",
        (
            f"{_IDENTITY}::test_a_change_is_refused_by_its_name",
            "tests/distributed/test_run.py::test_other_settings_are_not_mixed_into_a_run",
        ),
    ),
    16: (
        "a file of the base is cut short, or its index lacks a tensor",
        (f"{_REFUSED}::test_a_broken_base_ends_all_ranks_with_the_file_s_name",),
    ),
    17: (
        "a checkpoint is a pickle with a payload",
        (f"{_CHECKPOINT}::test_pickle_is_refused_and_never_runs",),
    ),
    18: (
        "the base needs code of its own",
        (
            f"{_REFUSED}::test_a_base_that_needs_code_of_its_own_is_refused",
            "tests/unit/test_config.py::test_settings_of_later_versions_are_named",
        ),
    ),
    31: (
        "two jobs on one output folder",
        (
            f"{_RESUME}::test_a_second_job_on_the_folder_is_refused",
            f"{_RESUME}::test_its_lock_is_taken_over_at_once_and_given_back",
            "tests/unit/test_run_lock.py::test_of_many_at_once_one_gets_it",
            "tests/unit/test_run_lock.py::test_a_requeued_job_has_its_own_lock_back",
        ),
    ),
    32: (
        "the base changes, or something of it is trained",
        (
            f"{_RESUME}::test_the_base_is_what_it_was_and_only_prompts_have_gradients",
            "tests/distributed/test_equivalence.py::test_base_is_the_checkpoint_s_and_never_changes",
        ),
    ),
}
