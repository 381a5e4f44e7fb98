"""Which tests stand for which fault of numbers, rows, settings and the tracker."""

from __future__ import annotations

_RUN = "tests/distributed/test_run.py"
_EQUIVALENCE = "tests/distributed/test_equivalence.py"
_MLFLOW = "tests/integration/test_mlflow.py"
_LOOP = "tests/unit/test_loop.py"
_ROWS = "tests/unit/test_rows.py"
_TOKENS = "tests/unit/test_tokenize.py"
_LAUNCH = "tests/unit/test_launch.py"

#: By the number of the fault: what it is, and the tests.
FAULTS: dict[int, tuple[str, tuple[str, ...]]] = {
    19: (
        "a loss is NaN on one rank only",
        (
            f"{_EQUIVALENCE}::test_nan_on_one_rank_skips_that_prompt_on_all",
            f"{_LOOP}::test_a_diverged_prompt_is_stopped_alone",
            f"{_LOOP}::test_a_run_fails_once_every_prompt_has_diverged",
        ),
    ),
    20: (
        "a gradient is infinite, or spikes",
        (
            "tests/unit/test_prompt_optimizer.py::test_non_finite_norm_changes_nothing",
            "tests/unit/test_prompt_optimizer.py::test_step_is_clipped_adamw",
            "tests/unit/test_bank.py::test_overflow_inside_an_encoder_skips_that_prompt_alone",
            f"{_RUN}::test_a_diverged_prompt_is_stopped_alone",
        ),
    ),
    21: (
        "rows without a label",
        (
            "tests/unit/test_chat.py::test_malformed_token_ids",
            "tests/unit/test_chat.py::test_token_ids_that_are_too_long",
        ),
    ),
    22: (
        "prompt and text are longer than the context",
        (
            f"{_TOKENS}::test_too_long_refuse_names_rows",
            f"{_TOKENS}::test_too_long_skip_counts_and_keeps_row_numbers",
            f"{_TOKENS}::test_truncate_cuts_the_input_from_the_left_and_keeps_bos_and_prefix",
            f"{_TOKENS}::test_no_room_for_text",
        ),
    ),
    23: (
        "malformed rows",
        (
            f"{_ROWS}::test_bad_json_names_line_and_column",
            f"{_ROWS}::test_bad_utf8_names_line_and_column",
            f"{_ROWS}::test_null_empty_and_nested_values",
            f"{_ROWS}::test_mixed_kinds_name_the_odd_row",
            f"{_ROWS}::test_ten_problems_and_how_many_more",
        ),
    ),
    24: (
        "the tokenizer is another base's",
        (
            f"{_TOKENS}::test_check_vocabulary",
            "tests/unit/test_initializers.py::test_tokenizer_of_another_base_is_refused",
        ),
    ),
    25: (
        "ranks have uneven rows, or none",
        (
            f"{_EQUIVALENCE}::test_fewer_rows_than_ranks",
            "tests/unit/test_packed_batch.py::test_no_row_of_an_epoch_is_lost_or_repeated_whatever_the_ranks",
        ),
    ),
    26: (
        "the tracker is down at the start, killed, hangs, or answers 500",
        (
            f"{_MLFLOW}::test_a_training_ends_well_while_its_server_fails_hangs_and_is_gone",
            f"{_MLFLOW}::test_a_broken_tracker_costs_the_trainer_nothing",
            f"{_MLFLOW}::test_over_http_with_the_server_killed_in_between",
        ),
    ),
    27: (
        "two ranks that are requeued",
        (
            "tests/slurm/test_training.py::test_it_is_one_run_of_mlflow_with_one_run_per_prompt",
            f"{_MLFLOW}::test_killed_twice_then_finished_is_one_run_without_doubles",
        ),
    ),
    28: (
        "an upload of files fails",
        (f"{_MLFLOW}::test_a_training_ends_well_while_its_server_fails_hangs_and_is_gone",),
    ),
    29: (
        "secrets in the tracker's address",
        (
            f"{_MLFLOW}::test_a_training_ends_well_while_its_server_fails_hangs_and_is_gone",
            f"{_MLFLOW}::test_a_broken_tracker_costs_the_trainer_nothing",
            "tests/unit/test_metrics_log.py::test_secrets_are_known_decoded_too",
        ),
    ),
    30: (
        "a typo, a negative learning rate, a port in use, a GPU that is missing",
        (
            f"{_LAUNCH}::test_bad_input_is_exit_code_2_at_once_in_one_message",
            f"{_LAUNCH}::test_a_port_in_use_and_missing_gpus_are_refused_before_ranks_start",
        ),
    ),
}
