"""The run file: what is accepted, and how every kind of mistake is worded and located."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path

import pytest
import yaml

from trainer import config
from trainer.config import RunConfig, load, parse_bytes
from trainer.config.run import NOT_YET_KEYS
from trainer.config.types import Section
from trainer.runtime.errors import BadInput

GOOD = """\
output_dir: runs/x
base:
  model: some/base
tasks:
  - name: triage
    train: train.jsonl
    input: "{text}\\nTopic:"
    target: " {label}"
    choices: [a, b]
    metric: accuracy
prompts:
  - name: one
    task: triage
    num_virtual_tokens: 5
  - name: two
    task: triage
    method: p_tuning
training:
  steps: 10
"""


@pytest.fixture
def run_file(tmp_path: Path):
    def write(text: str = GOOD) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def problems_of(path: Path, *overrides: str) -> list[str]:
    """The problems of a bad run file, with the file's own name shortened to ``FILE``."""
    with pytest.raises(BadInput) as caught:
        load(path, overrides)
    return [problem.replace(str(path), "FILE") for problem in caught.value.problems]


def replaced(old: str, new: str) -> str:
    assert GOOD.count(old) == 1, old
    return GOOD.replace(old, new)


def test_defaults_are_those_of_the_design(run_file):
    run = load(run_file())
    assert (run.base.quantization, run.base.matmul, run.base.dtype) == ("int8", "auto", "auto")
    assert run.engine.deepspeed == "ds_configs/zero3.json"
    assert run.training.tokens_per_step == 8192
    assert run.prompts[0].init.auto
    assert [prompt.encoder_name for prompt in run.prompts] == ["embedding", "mlp"]
    assert run.tasks[0].append_eos
    assert run.tracking.uri is None


def test_dump_of_the_resolved_file_loads_to_the_same(run_file):
    run = load(run_file(), ["prompts.one.init={text: 'Ä text: with colon'}", "training.seed=7"])
    again = load(run_file(config.dump(run)))
    assert again == run
    assert yaml.safe_load(config.dump(run))["checkpoint"] == {"every": 50, "keep": 3}


def test_sections_are_immutable(run_file):
    run = load(run_file())
    with pytest.raises(ValueError, match="frozen"):
        run.training.steps = 5  # type: ignore[misc]


def test_seed_of_a_prompt_is_its_own_or_the_runs(run_file):
    run = load(run_file(), ["training.seed=4", "prompts.two.seed=0"])
    assert [run.prompt_seed(prompt) for prompt in run.prompts] == [4, 0]


@pytest.mark.parametrize(
    ("template", "fields"),
    [
        ("{text}\nTopic:", ["text"]),
        ("{a} and {b}{c}{a}", ["a", "b", "c"]),
        ('{"key": "{a}"}', ["a"]),
        ("{}", []),
        ("{{not}} {yes}", ["yes"]),
        ("{{{yes}}}", ["yes"]),
        ("plain", []),
    ],
)
def test_template_fields(template, fields):
    assert config.template_fields(template) == fields


# Overrides


def test_overrides_reach_settings_by_key_index_and_name(run_file):
    run = load(
        run_file(),
        [
            "training.steps=99",
            "prompts[0].learning_rate=1e-2",
            "prompts.two.num_virtual_tokens=7",
            "prompts.1.seed=3",
            "evaluation.early_stopping.patience=2",
            "tasks.triage.validation=valid.jsonl",
            "tracking.uri=",
            "tasks.triage.choices=[x, y, z]",
        ],
    )
    assert run.training.steps == 99
    assert run.prompts[0].learning_rate == 0.01
    assert (run.prompts[1].num_virtual_tokens, run.prompts[1].seed) == (7, 3)
    assert run.evaluation.early_stopping is not None
    assert run.evaluation.early_stopping.patience == 2
    assert run.tracking.uri is None
    assert run.tasks[0].choices == ["x", "y", "z"]


@pytest.mark.parametrize(
    ("value", "expected"),
    {
        "Issue #{n} # {text}": "Issue #{n} # {text}",
        " # {text} ": "# {text}",
        "Read {text}\n\nTopic ": "Read {text}\n\nTopic",
        '"{text} # "': "{text} # ",
        "5 # {text}": "5 # {text}",
    }.items(),
)
def test_a_text_in_an_override_may_contain_a_hash_without_quotes(run_file, value, expected):
    assert load(run_file(), [f"tasks[0].input={value}"]).tasks[0].input == expected


@pytest.mark.parametrize("value", ["'{text}' # é", "[a, 'é'] # é", "{text} # é"])
def test_a_comment_after_another_value_of_an_override_is_refused(run_file, value):
    override = f"tasks[0].hand_written={value}"
    assert problems_of(run_file(), override) == [
        f"{override!r}: tasks[0].hand_written: # é is a comment in YAML; put the whole value in "
        "quotes, or remove the comment"
    ]


def test_overrides_reach_items_whose_names_contain_dots(run_file):
    text = GOOD.replace("triage", "v1.5").replace("name: two", "name: two.0.seed")
    run = load(
        run_file(text),
        [
            "prompts.two.0.seed.seed=3",
            "prompts[two.0.seed].num_virtual_tokens=7",
            "tasks.v1.5.choices=[yes, no]",
        ],
    )
    assert (run.prompts[1].num_virtual_tokens, run.prompts[1].seed) == (7, 3)
    assert run.tasks[0].choices == ["yes", "no"]


def test_the_last_override_wins_and_null_sections_can_be_entered(run_file):
    text = GOOD + "evaluation: {early_stopping: null}\n"
    run = load(
        run_file(text),
        [
            "training.steps=1",
            "training.steps=2",
            "tasks.triage.validation=valid.jsonl",
            "evaluation.early_stopping.patience=4",
        ],
    )
    assert run.training.steps == 2
    assert run.evaluation.early_stopping is not None


def test_steps_of_a_prompt_are_its_own_or_the_runs(run_file):
    run = load(run_file(), ["prompts.two.steps=25"])
    assert [run.prompt_steps(prompt) for prompt in run.prompts] == [10, 25]
    assert run.last_step == 25


def test_halving(run_file):
    validated = "tasks.triage.validation=valid.jsonl"
    run = load(run_file(), [validated, "search.halving.first=3"])
    assert run.search.halving is not None
    assert (run.search.halving.eta, run.search.halving.first) == (3, 3)
    none = "tasks.triage.validation_share=0"
    (problem,) = problems_of(run_file(), none, "search.halving.first=3")
    assert "search.halving: task 'triage' has no validation rows" in problem
    (problem,) = problems_of(run_file(), validated, "search.halving.first=10")
    assert "search.halving.first: 10 is not before the last step (10)" in problem
    (problem,) = problems_of(run_file(), validated, "search.halving={first: 2, eta: 1}")
    assert "search.halving.eta: 1 must be greater than or equal to 2" in problem


def test_halving_without_prompts_to_compare_is_noted(run_file):
    run = load(run_file(), ["tasks.triage.validation_share=0.1", "search.halving.first=3"])
    assert run.notes == []
    one, two = run.prompts
    (note,) = run.model_copy(update={"prompts": [one]}).notes
    assert "search.halving: stops no prompt, because it compares the prompts of a task" in note
    assert "each task has only one; add prompts, or remove halving" in note
    taught = two.model_copy(update={"objective": "distill", "teacher": "Read."})
    (note,) = run.model_copy(update={"prompts": [one, taught]}).notes
    assert "each task and teacher has only one" in note


def test_more_prompts_than_max_prompts(run_file):
    (problem,) = problems_of(run_file(), "search.max_prompts=1")
    assert problem.endswith("prompts: 2, but search.max_prompts is 1; raise it, or split the run")


def test_a_name_made_of_digits_is_found_before_an_index(run_file):
    text = replaced("- name: two", '- name: "0"')
    run = load(run_file(text), ["prompts.0.seed=5"])
    assert [prompt.seed for prompt in run.prompts] == [None, 5]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.steps", "an override is written key=value, for example training.steps=100"),
        ("=5", "an override is written key=value, for example training.steps=100"),
        ("prompts.tow.seed=1", "no item 'tow' (did you mean 'two'?); known: one, two"),
        ("prompts.TWO.seed=1", "no item 'TWO' (did you mean 'two'?); known: one, two"),
        ("prompts[9].seed=1", "no item '9'; known: one, two"),
        (
            "training.steps.x=1",
            "training.steps is a single value in this run file, without 'x'; override "
            "training.steps itself",
        ),
        ("training.steps=[1", "the value is not valid YAML; quote it"),
    ],
)
def test_overrides_of_unknown_settings_are_refused(run_file, override, expected):
    assert problems_of(run_file(), override) == [f"{override!r}: {expected}"]


def test_every_bad_override_is_reported(run_file):
    assert len(problems_of(run_file(), "a", "b", "prompts.x.y=1")) == 3


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.steps=-1", "training.steps: -1 must be greater than 0"),
        ("prompts.two.seed=-5", "prompts[1].seed: -5 must be greater than or equal to 0"),
        ("training={}", "training.steps: is missing; add it"),
        (
            "evaluation.early_stopping.patience=0",
            "evaluation.early_stopping.patience: 0 must be greater than 0",
        ),
        (
            "tasks.triage.choices=[a]",
            "tasks[0].choices: ['a'] must be at least two different values",
        ),
    ],
)
def test_a_bad_value_from_an_override_names_the_override(run_file, override, expected):
    assert problems_of(run_file(), override) == [f"override {override!r}: {expected}"]


def test_an_unknown_section_made_by_an_override_names_the_override(run_file):
    (problem,) = problems_of(run_file(), "trainig.steps=5")
    assert problem.startswith("override 'trainig.steps=5': trainig: unknown setting")
    assert "did you mean 'training'?" in problem


# Values and keys


@pytest.mark.parametrize(
    ("old", "new", "line", "expected"),
    [
        ("steps: 10", "steps: 0", 19, "training.steps: 0 must be greater than 0"),
        ("steps: 10", "steps: true", 19, "training.steps: true is not a number"),
        ("steps: 10", "steps: [1]", 19, "training.steps: [1] is not an integer"),
        ("steps: 10", "seed: 1", 18, "training.steps: is missing; add it"),
        (
            "num_virtual_tokens: 5",
            "learning_rate: -0.1",
            14,
            "prompts[0].learning_rate: -0.1 must be greater than 0",
        ),
        (
            "num_virtual_tokens: 5",
            "warmup_ratio: 1.5",
            14,
            "prompts[0].warmup_ratio: 1.5 must be less than or equal to 1",
        ),
        (
            "num_virtual_tokens: 5",
            "nmu_virtual_tokens: 5",
            14,
            "prompts[0].nmu_virtual_tokens: unknown setting (did you mean 'num_virtual_tokens'?)",
        ),
        (
            "method: p_tuning",
            "method: p_tunning",
            17,
            "prompts[1].method: 'p_tunning' is not one of prompt_tuning, p_tuning, prefix_tuning "
            "(did you mean 'p_tuning'?)",
        ),
        (
            "method: p_tuning",
            "encoder: mlp",
            17,
            "prompts[1].encoder: prompt_tuning has no mlp encoder; use method: p_tuning",
        ),
        (
            "method: p_tuning",
            "init: zero",
            17,
            "prompts[1].init: zero works with method: prefix_tuning only",
        ),
        (
            "method: p_tuning",
            "init: {text: x, vocab: true}",
            17,
            "prompts[1].init: give exactly one of auto, search, text, labels, vocab, random, zero, "
            "from",
        ),
        (
            "- name: two",
            "- name: a b",
            15,
            "prompts[1].name: 'a b' must be letters, digits and . _ -",
        ),
        (
            "- name: two",
            "- name: one",
            11,
            "prompts: names must be unique; used more than once: one",
        ),
        (
            "choices: [a, b]",
            "choices: [[yes], b]",
            9,
            "tasks[0].choices[0]: ['yes'] must be a string; put it in quotes",
        ),
        (
            "choices: [a, b]",
            "append_eos: true",
            5,
            "tasks[0].choices: metric accuracy needs them; list the labels, or use exact_match",
        ),
        (
            'target: " {label}"',
            'target: " {a} {b}"',
            9,
            "tasks[0].choices: target must have exactly one {column} field, but has 2",
        ),
        (
            'input: "{text}\\nTopic:"',
            'input: "Topic:"',
            7,
            "tasks[0].input: has no {column} field",
        ),
        (
            "output_dir: runs/x",
            "output_dir: 5",
            1,
            "output_dir: 5 must be a string; put it in quotes",
        ),
        ("output_dir: runs/x", "# nothing", None, "output_dir: is missing; add it"),
        (
            "  model: some/base",
            "  model: some/base\n  quantisation: none",
            4,
            "base.quantisation: unknown setting (did you mean 'quantization'?); known: model,",
        ),
    ],
)
def test_each_mistake_is_one_problem_with_its_line(run_file, old, new, line, expected):
    problems = problems_of(run_file(replaced(old, new)))
    assert len(problems) == 1, problems
    where = f"FILE:{line}: " if line else "FILE: "
    assert problems[0].startswith(where + expected), problems[0]


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf"])
@pytest.mark.parametrize("setting", ["learning_rate", "weight_decay", "warmup_ratio"])
def test_numbers_that_are_not_finite_are_refused(run_file, setting, value):
    (problem,) = problems_of(run_file(), f"prompts.one.{setting}={value}")
    assert f"prompts[0].{setting}: " in problem


def test_infinite_search_is_refused(run_file):
    (problem,) = problems_of(run_file(), "search.init_share=.inf")
    assert "search.init_share: inf must be a finite number" in problem


@pytest.mark.parametrize("value", ["3e-3", "3.0e-3", "0.003"])
def test_learning_rates_may_be_written_as_people_write_them(run_file, value):
    assert math.isclose(
        load(run_file(), [f"prompts.one.learning_rate={value}"]).prompts[0].learning_rate, 0.003
    )


def test_values_are_shown_as_in_yaml(run_file):
    assert problems_of(run_file(), "evaluation=", "tracking.tensorboard=2") == [
        "override 'evaluation=': evaluation: is empty; remove it, or give a setting: every, "
        "early_stopping, train_rows",
        "override 'tracking.tensorboard=2': tracking.tensorboard: 2 is neither true nor false",
    ]


@pytest.mark.parametrize("section", ["tasks", "prompts"])
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("[]", "[] is empty; give at least one"),
        ("null", "null must be a list; start every item with a dash"),
        ("triage", "'triage' must be a list; start every item with a dash"),
    ],
)
def test_tasks_and_prompts_are_lists_of_at_least_one(run_file, section, value, expected):
    problems = problems_of(run_file(), f"{section}={value}")
    assert problems == [f"override '{section}={value}': {section}: {expected}"]


@pytest.mark.parametrize("value", ["sometimes", "3", "null"])
def test_a_union_is_one_problem_that_names_all_its_values(run_file, value):
    (problem,) = problems_of(run_file(), f"engine.gradient_checkpointing={value}")
    assert "engine.gradient_checkpointing: " in problem
    assert problem.endswith("is not one of auto, true, false")


@pytest.mark.parametrize(("value", "expected"), [("auto", "auto"), ("true", True), ("no", False)])
def test_a_union_takes_each_of_its_values(run_file, value, expected):
    run = load(run_file(), [f"engine.gradient_checkpointing={value}"])
    assert run.engine.gradient_checkpointing == expected


@pytest.mark.parametrize("value", ["auto", 4096])
def test_tokens_of_a_packed_batch(run_file, value):
    run = load(run_file(), [f"training.micro_batch_tokens={value}"])
    assert run.training.micro_batch_tokens == value


@pytest.mark.parametrize("value", ["0", "-2", "true", "many", "2.5", "null"])
def test_other_tokens_of_a_packed_batch_are_refused(run_file, value):
    (problem,) = problems_of(run_file(), f"training.micro_batch_tokens={value}")
    assert "training.micro_batch_tokens: " in problem
    assert "is not auto or a number of tokens" in problem


def test_a_license_is_an_id_of_the_hub(run_file):
    assert load(run_file()).license is None
    assert load(run_file(), ["license=Apache-2.0"]).license == "apache-2.0"
    (problem,) = problems_of(run_file(), "license=Apache 2.0")
    assert "license: 'Apache 2.0' is not an id of the hub's list" in problem


@pytest.mark.parametrize("value", ["auto", "world", "node", 4])
def test_shard_groups(run_file, value):
    assert load(run_file(), [f"engine.shard_group={value}"]).engine.shard_group == value


@pytest.mark.parametrize("value", ["0", "-2", "true", "half", "2.5", "null"])
def test_other_shard_groups_are_refused(run_file, value):
    (problem,) = problems_of(run_file(), f"engine.shard_group={value}")
    assert "engine.shard_group: " in problem
    assert problem.endswith("is not one of auto, world, node or a number of ranks")


@pytest.mark.parametrize(
    ("size", "expected"), [("24GB", 24 * 10**9), ("1.5 TB", 15 * 10**11), ("20MB", 20_000_000)]
)
def test_sizes(run_file, size, expected):
    run = load(run_file(), [f"engine.base_memory={size}"])
    assert parse_bytes(run.engine.base_memory) == expected


@pytest.mark.parametrize("size", ["24", "24GiB", "much", "-1GB", "null"])
def test_other_sizes_are_refused(run_file, size):
    (problem,) = problems_of(run_file(), f"engine.base_memory={size}")
    assert "engine.base_memory: " in problem
    assert problem.endswith("is no size; write a number and KB, MB, GB or TB, as 24GB")


def test_a_value_where_a_section_belongs(run_file):
    (problem,) = problems_of(run_file(), "evaluation.early_stopping=3")
    assert problem.endswith("evaluation.early_stopping: 3 must be a mapping; known: patience")


def test_long_values_are_cut(run_file):
    (problem,) = problems_of(run_file(), f"training.steps={'x' * 5000}")
    assert len(problem) < 400
    assert "..." in problem


def test_all_mistakes_are_reported_at_once(run_file):
    text = GOOD.replace("steps: 10", "steps: -1").replace("num_virtual_tokens: 5", "tokens: 5")
    text = text.replace("  model: some/base", "  model: some/base\n  dtype: int4")
    lines = [problem.split(": ")[1] for problem in problems_of(run_file(text))]
    assert lines == ["base.dtype", "prompts[0].tokens", "training.steps"]


def test_several_mistakes_of_one_task_are_reported_at_once(run_file):
    text = replaced('input: "{text}\\nTopic:"', "input: x").replace("[a, b]", "[a, a]")
    settings = [problem.split(": ")[1] for problem in problems_of(run_file(text))]
    assert settings == ["tasks[0].input", "tasks[0].choices"]


def test_every_prompt_of_an_unknown_task_is_reported(run_file):
    text = GOOD.replace("task: triage", "task: triaje")
    problems = problems_of(run_file(text))
    assert [problem.split(": ")[:2] for problem in problems] == [
        ["FILE:13", "prompts[0].task"],
        ["FILE:16", "prompts[1].task"],
    ]
    assert all("known: triage (did you mean 'triage'?)" in problem for problem in problems)


# What a later version brings


@pytest.mark.fault("base requires remote code")
@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("base.trust_remote_code=true", "base.trust_remote_code"),
    ],
)
def test_settings_of_later_versions_are_named(run_file, override, key):
    (problem,) = problems_of(run_file(), override)
    assert problem.endswith(f"not supported yet; {NOT_YET_KEYS[key]}")


def test_labels_need_choices(run_file):
    assert load(run_file(), ["prompts.one.init=labels"]).prompts[0].init.labels
    without = replaced("    choices: [a, b]\n    metric: accuracy\n", "")
    (problem,) = problems_of(run_file(without), "prompts.one.init={labels: true}")
    assert "prompts[0].init.labels: task 'triage' has no choices; list them" in problem


def test_a_prompt_to_start_from_is_written_as_it_was_read(run_file, tmp_path):
    run = load(run_file(), ["prompts.one.init={from: runs/other}"])
    assert run.prompts[0].init.from_ == "runs/other"
    again = tmp_path / "again.yaml"
    again.write_text(config.dump(run))
    assert load(again) == run
    (problem,) = problems_of(run_file(), "prompts.one.init={form: runs/other}")
    assert "unknown setting (did you mean 'from'?)" in problem
    assert "from_" not in problem


@pytest.mark.parametrize("encoder", ["lstm", "residual"])
def test_encoders_of_p_tuning(run_file, encoder):
    chosen = f"prompts.two.encoder={encoder}"
    assert load(run_file(), [chosen]).prompts[1].encoder_name == encoder
    (problem,) = problems_of(run_file(), f"prompts.one.encoder={encoder}")
    assert f"prompts[0].encoder: prompt_tuning has no {encoder} encoder" in problem
    assert "use method: p_tuning" in problem


def test_a_search_for_an_encoder_that_starts_elsewhere_is_refused(run_file):
    lstm = "prompts.two.encoder=lstm"
    assert load(run_file(), [lstm, "prompts.two.init=auto"]).prompts[1].init.auto
    (problem,) = problems_of(run_file(), lstm, "prompts.two.init=search")
    assert "prompts[1].init: search cannot choose tokens for encoder lstm" in problem


def test_prompts_that_share_an_encoder_need_equal_settings(run_file):
    text = ["prompts.two.encoder=text", "prompts.two.init={text: Sort it.}"]
    assert load(run_file(), [*text, "prompts.two.share=s"]).prompts[1].share == "s"
    (problem,) = problems_of(run_file(), text[0])
    assert "prompts[1].init: encoder text reads a text; use init: {text: ...}" in problem
    one = [f"prompts.one.{x}" for x in ("method=p_tuning", "encoder=text", "init={text: Read.}")]
    shared = [*text, *one, "prompts.one.share=s", "prompts.two.share=s"]
    problems = problems_of(run_file(), *shared, "prompts.two.seed=4")
    assert len(problems) == 2
    assert "prompts[1].num_virtual_tokens: differs from that of 'one', but both" in problems[0]
    assert "prompts[1].seed: differs from that of 'one'" in problems[1]
    places = "prompts.two.position=user", "tasks.triage.chat=true"
    assert load(run_file(), [*shared, "prompts.two.num_virtual_tokens=5", *places])
    run = load(run_file(), [*shared, "prompts.two.num_virtual_tokens=5"])
    assert [prompt.init.text for prompt in run.prompts] == ["Read.", "Sort it."]


def test_low_rank_and_share_require_their_settings(run_file):
    low = ["prompts.one.encoder=low_rank", "prompts.one.share=s", "prompts.one.rank=2"]
    assert load(run_file(), low).prompts[0].rank == 2
    (problem,) = problems_of(run_file(), low[0])
    assert "prompts[0].share: is missing; encoder low_rank trains a prompt that all" in problem
    (problem,) = problems_of(run_file(), "prompts.one.share=s")
    assert (
        "prompts[0].share: encoder embedding of prompt_tuning does not use it; remove it, or"
        in problem
    )
    (problem,) = problems_of(run_file(), "prompts.one.rank=2")
    assert "prompts[0].rank: encoder embedding of prompt_tuning does not use it" in problem


def test_only_a_residual_encoder_has_an_mlp_for_each_token(run_file):
    separate = "prompts.two.residual_mlp=separate"
    (problem,) = problems_of(run_file(), separate)
    assert "prompts[1].residual_mlp: encoder mlp of p_tuning does not use it" in problem
    (prompt,) = load(run_file(), [separate, "prompts.two.encoder=residual"]).prompts[1:]
    assert prompt.residual_mlp == "separate"


def test_prefix_tuning_and_its_encoders(run_file):
    prefix = "prompts.one.method=prefix_tuning"
    assert load(run_file(), [prefix]).prompts[0].encoder_name == "embedding"
    wide = [prefix, "prompts.one.encoder=mlp", "prompts.one.encoder_hidden_size=8"]
    assert load(run_file(), wide).prompts[0].encoder_name == "mlp"
    (problem,) = problems_of(run_file(), prefix, "prompts.one.encoder_hidden_size=8")
    assert "encoder_hidden_size: encoder embedding of prefix_tuning does not use it" in problem


@pytest.mark.parametrize("name", ["vocab", "random", "zero"])
def test_short_forms_of_init(run_file, name):
    overrides = ["prompts.one.method=prefix_tuning", f"prompts.one.init={name}"]
    init = load(run_file(), overrides).prompts[0].init
    assert getattr(init, name) is True


# The file itself


def test_missing_files_folders_and_bad_encodings_are_refused(tmp_path):
    assert "no such run file" in problems_of(tmp_path / "none.yaml")[0]
    os.mkfifo(tmp_path / "pipe.yaml")
    assert "FILE: is a pipe or device" in problems_of(tmp_path / "pipe.yaml")[0]
    assert "is a folder" in problems_of(tmp_path)[0]
    bad = tmp_path / "latin.yaml"
    bad.write_bytes(b"output_dir: caf\xe9\n")
    assert problems_of(bad) == ["FILE: not UTF-8 at byte 15; save it as UTF-8"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "FILE: a run file is a mapping of settings; `promptshard init` writes one"),
        ("- a\n", "FILE: a run file is a mapping of settings; `promptshard init` writes one"),
        ("a: 1\nb: [1\nc: 2\n", "FILE:3: not valid YAML: "),
        ("a: 1\n\tb: 2\n", "FILE:2: not valid YAML: "),
        ("a: !!python/object/apply:os.getcwd []\n", "FILE:1: a: tag !!python/object/apply:os.get"),
        ("a: 1\n---\nb: 2\n", "FILE:2: not valid YAML: a second document begins"),
        ("a: 1\n? [b]\n: 2\n", "FILE:2: a key must be text, not a list or mapping"),
    ],
)
def test_files_that_are_not_run_files_are_refused(run_file, text, expected):
    (problem,) = problems_of(run_file(text))
    assert problem.startswith(expected)


def test_a_setting_given_twice_is_refused(run_file):
    text = GOOD + "  seed: 1\n  steps: 12\n"
    assert problems_of(run_file(text)) == ["FILE:21: training.steps: duplicate key; remove one"]


def test_resolve_path_prefers_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = config.resolve_path("ds_configs/zero3.json")
    assert shipped.is_absolute()
    assert shipped.is_file()
    own = tmp_path / "ds_configs" / "zero3.json"
    own.parent.mkdir()
    own.write_text("{}")
    assert config.resolve_path("ds_configs/zero3.json") == Path("ds_configs/zero3.json")
    assert config.resolve_path("nowhere/x") == Path("nowhere/x")


def test_every_setting_but_plain_names_says_what_it_is():
    bare = [
        f"{model.__name__}.{name}"
        for model in Section.__subclasses__()
        if model.__module__.startswith("trainer.config.")  # the sections of run files
        for name, info in model.model_fields.items()
        if model is not RunConfig and model.__name__[0] != "_" and info.description is None
    ]
    known = {"name", "task", "method", "init", "learning_rate", "weight_decay", "steps", "seed"}
    known |= {"num_virtual_tokens", "patience", "experiment", "early_stopping"}
    assert {name.split(".")[1] for name in bare} <= known


# Settings that would have no effect


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("betas=0.9", "prompts[0].betas: 0.9 must be a list of two numbers, as [0.8, 0.99]"),
        ("betas=[0,0,0]", "prompts[0].betas: [0, 0, 0] must be a list of two numbers, as [0.8"),
        ("betas=[0.8,1]", "prompts[0].betas[1]: 1 must be less than 1"),
        (
            "optimizer=adafactor prompts.one.betas=[0.8,0.9]",
            "prompts[0].betas: adafactor does not use them",
        ),
        (
            "optimizer=adamw prompts.one.momentum=0.9",
            "prompts[0].momentum: adamw does not use it; use",
        ),
        (
            "optimizer=muon prompts.one.method=p_tuning",
            "prompts[0].optimizer: muon cannot train encoder mlp; use adamw",
        ),
        ("weight_decay_to_init=true", "prompts[0].weight_decay_to_init: weight_decay is 0"),
        ("preset=leser", "prompts[0].preset: 'leser' is not one of lester"),
        ("ema=1", "prompts[0].ema: 1 must be less than 1"),
        ("optimizer=sgd", "prompts[0].learning_rate: optimizer sgd has no default; set one"),
    ],
)
def test_optimizer_settings_without_effect_are_refused(run_file, setting, problem):
    (problems,) = problems_of(run_file(), *f"prompts.one.{setting}".split())
    assert problem in problems


def test_a_blank_hand_written_prompt(run_file):
    (problems,) = problems_of(run_file(), 'tasks.triage.hand_written=[Look, " "]')
    assert "tasks[0].hand_written[1]" in problems
    (problems,) = problems_of(run_file(), "tasks.triage.hand_written=[Look, Look]")
    assert problems.endswith("tasks[0].hand_written: 'Look' is listed more than once; remove one")


def test_learning_rate_and_relative_learning_rate_are_exclusive(run_file):
    both = ["prompts.one.learning_rate=0.1", "prompts.one.relative_learning_rate=0.1"]
    (problems,) = problems_of(run_file(), *both)
    assert "prompts[0].relative_learning_rate: learning_rate is given too; remove one" in problems
    (problems,) = problems_of(
        run_file(), "prompts.one.optimizer=sgd", "prompts.one.relative_learning_rate=0.1"
    )
    assert "relative_learning_rate: an update of sgd scales with the gradient" in problems
    reader = ["method=p_tuning", "encoder=text", "relative_learning_rate=0.1", "init={text: a b}"]
    (problems,) = problems_of(run_file(), *(f"prompts.one.{setting}" for setting in reader))
    assert "encoder text has no scale to be relative to; use learning_rate" in problems


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("tasks.triage.hand_written=[Look]", "hand_written: needs validation rows"),
        ("tasks.triage.shifted_validation=s.jsonl", "shifted_validation: needs validation rows"),
        ("evaluation.early_stopping.patience=2", "has no validation rows"),
    ],
)
def test_settings_that_need_validation_accept_a_share_of_train(run_file, setting, problem):
    load(run_file(), [setting])
    with pytest.raises(BadInput, match=re.escape(problem)):
        load(run_file(), [setting, "tasks.triage.validation_share=0"])


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("tasks.triage.tests=calls", "tests: metric accuracy does not use it"),
        ("prompts.one.encoder_hidden_size=8", "encoder_hidden_size: encoder embedding of prompt"),
        ("output_dir=", "output_dir"),
        ("base.trust_remote_code=true", "base.trust_remote_code: not supported yet"),
    ],
)
def test_a_setting_without_effect_is_refused(run_file, override, problem):
    with pytest.raises(BadInput, match=re.escape(problem)):
        load(run_file(), [override])


# Where rows come from


def test_sources_have_short_forms_and_dump_in_full(run_file):
    text = "[a.jsonl, data/*.csv, hf://org/name, {path: b.jsonl, max_rows: 5}]"
    run = load(run_file(), [f"tasks.triage.train={text}", "tasks.triage.validation=v.parquet"])
    train = run.tasks[0].train
    assert [source.label for source in train] == [
        "a.jsonl",
        "data/*.csv",
        "hf://org/name",
        "b.jsonl",
    ]
    assert (train[2].hub, train[3].max_rows, train[0].weight) == ("org/name", 5, None)
    assert run.tasks[0].validation is not None
    assert [source.path for source in run.tasks[0].validation] == ["v.parquet"]
    assert load(run_file(config.dump(run))) == run


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("train=[]", "tasks[0].train: [] is empty; give at least one"),
        ("train={path: a, hub: b}", "tasks[0].train[0]: give either path or hub"),
        ("train={weight: 2}", "tasks[0].train[0]: give either path or hub"),
        ("train={path: a, revision: main}", "train[0].revision: works with hub only; remove it"),
        ("train={path: a, wieght: 2}", "train[0].wieght: unknown setting (did you mean 'weight'?)"),
        ("train=[{path: a, weight: 2}, b]", "train[1].weight: is missing; give every source"),
        ("validation=[{path: a, weight: 2}]", "validation: weight works with train only"),
        (
            "optional=[txt]",
            "optional: 'txt' is not a column of input (did you mean 'text'?); its c",
        ),
        ("{input: '{a}{label}', optional: [label]}", "optional: 'label' is also a column of tar"),
        ("validation_share=1", "validation_share: 1 must be less than 1"),
        ("{validation: v.jsonl, validation_share: 0.2}", "validation_share: validation is set too"),
        ("messages=turns", "input: rows come from messages; remove one"),
        ("tokens={}", "target: rows come from tokens; remove one"),
        ("{input: '', target: '', messages: m, tokens: {}}", "tokens: rows come from messages"),
        ("input=", "tasks[0].input: is missing; add it"),
        ("{metric: f1}", "metric: f1 compares sets of labels; set multi_label: true"),
        ("{metric: loss, multi_label: true, choices: null}", "choices: multi_label needs them"),
        ("{multi_label: true}", "metric: 'accuracy' compares single labels; use f1 or exact_match"),
        (
            "{multi_label: true, metric: f1, choices: ['a, b', c]}",
            "label_separator: ', ' also occurs in the choice 'a, b'",
        ),
    ],
)
def test_mistakes_in_the_data_settings_of_a_task(run_file, override, problem):
    task = yaml.safe_load(GOOD)["tasks"][0]
    if override.startswith("{"):
        task |= yaml.safe_load(override)
    else:
        key, _, value = override.partition("=")
        task[key] = yaml.safe_load(value) if value else ""
    text = yaml.safe_dump({**yaml.safe_load(GOOD), "tasks": [task]})
    assert any(problem in problems for problems in problems_of(run_file(text)))


@pytest.mark.parametrize(
    "form",
    [
        {"messages": "messages", "metric": "exact_match"},
        {"tokens": {"labels": "y"}},
        {"input": "{a}", "target": "{b}", "multi_label": True, "choices": [1, 2], "metric": "f1"},
    ],
)
def test_other_forms_of_rows(run_file, form):
    task = {"name": "triage", "train": "x.jsonl", **form}
    run = load(run_file(yaml.safe_dump({**yaml.safe_load(GOOD), "tasks": [task]})))
    assert load(run_file(config.dump(run))) == run
    assert not run.tasks[0].scored_by_likelihood


# Paths


def test_variables_and_home_are_expanded_in_every_path(run_file, monkeypatch):
    monkeypatch.setenv("WORK", "/work space")
    monkeypatch.setenv("HOME", "/home/me")
    paths = [
        "output_dir=$WORK/x",
        "base.model=${WORK}/base",
        "engine.deepspeed=~/zero3.json",
        "tasks.triage.train=[$WORK/*.jsonl, {path: ~/d.csv}, hf://org/name]",
        "tasks.triage.validation=$HOME/v.jsonl",
        "prompts.one.init={from: $WORK/old}",
        "tracking.uri=sqlite:///$HOME/mlflow.db",
    ]
    run = load(run_file(), paths)
    task = run.tasks[0]
    assert (run.output_dir, run.base.model) == ("/work space/x", "/work space/base")
    assert run.engine.deepspeed == "/home/me/zero3.json"
    assert [source.path for source in task.train] == ["/work space/*.jsonl", "/home/me/d.csv", None]
    assert task.validation is not None
    assert task.validation[0].path == "/home/me/v.jsonl"
    assert run.prompts[0].init.from_ == "/work space/old"
    assert run.tracking.uri == "sqlite:////home/me/mlflow.db"
    assert load(run_file(config.dump(run))) == run
    literal = load(run_file(), ["output_dir=a$$HOME$WORK/100$ x"])
    assert literal.output_dir == "a$HOME/work space/100$ x"
    assert load(run_file(config.dump(literal))) == literal, "what is written is not expanded again"
    secret = "http://me:pa$WORK@host:5000"
    assert load(run_file(), [f"tracking.uri={secret}"]).tracking.uri == secret


@pytest.mark.parametrize(
    "setting", ["output_dir", "base.model", "tasks.triage.train", "prompts.one.init.from"]
)
@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("$NOT_SET_HERE/x", "the environment variable 'NOT_SET_HERE' is not set; set it, or write"),
        ("~nosuchuser/x", "there is no such user; write the path in full"),
        ("a/" * 3000, "is too long for a path; 4095 bytes fit, 255 in a name"),
        ("x" * 256, "is too long for a path"),
        ('"a\\nb"', "'a\\nb' holds '\\n', which no path may; remove it"),
    ],
)
def test_impossible_paths_are_refused(run_file, setting, value, words):
    (problem,) = problems_of(run_file(), f"{setting}={value}")
    assert words in problem
    assert setting.split(".")[-1] in problem


def test_a_run_folder_may_have_a_dollar_in_its_name(run_file, tmp_path):
    folder = tmp_path / "$NOT_SET_HERE"
    folder.mkdir()
    (folder / "run.yaml").write_text(config.dump(load(run_file())))
    assert config.load_output(folder).output_dir == str(folder)


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("htp://me:secret@host", "'htp://***@host' has an unknown scheme 'htp'; use http(s)://"),
        ("runs/mlruns", "'runs/mlruns' is a folder, which MLflow no longer writes to; use sqlite"),
        ("http://", "'http://' has no host; use http://HOST:PORT"),
        ("http://host:port", "'http://host:port' is not a valid address"),
        ("sqlite://", "'sqlite://' names no file; use sqlite:///PATH/mlflow.db"),
        ("http://me:a secret@host", "holds ' ', which no address may; write it as %20"),
        ('postgresql://me:a"secret@host/x', "holds '\"', which no address may; write it as %22"),
    ],
)
def test_addresses_that_mlflow_cannot_use(run_file, uri, expected):
    (problem,) = problems_of(run_file(GOOD + f"tracking:\n  uri: {uri!r}\n"))
    assert problem.startswith(f"FILE:21: tracking.uri: {expected}")
    (problem,) = problems_of(run_file(), f"tracking.uri={uri}")
    assert f"tracking.uri: {expected}" in problem
    assert "secret" not in problem


@pytest.mark.parametrize(
    "uri",
    [
        "http://***@host:5000",
        "https://h/path?token=***",
        "http://[::1]:5",
        "sqlite:///a/b.db",
        "postgresql+psycopg2://u:p@db/x",
        "mysql://db/x",
        "mssql+pyodbc://me@db/x?driver=ODBC Driver 18 for SQL Server",
        "sqlite:///a b/c's.db",
        "databricks",
        "databricks://profile",
    ],
)
def test_addresses_that_mlflow_can_use(run_file, uri):
    assert load(run_file(), [f"tracking.uri={uri}"]).tracking.uri == uri
