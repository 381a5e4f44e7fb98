"""The reference of settings, their JSON schema, and the names that other trainers use."""

from __future__ import annotations

import json
import re
from pathlib import Path

import click
import jsonschema
import pytest

from launch import scaffold_commands, settings_text
from launch.run_templates import KINDS
from tests.command_line import promptshard
from tests.unit.test_config import GOOD
from trainer.config import RunConfig, dump, load, yaml_parser, yaml_source
from trainer.config.aliases import all_aliases
from trainer.config.explain import _all_settings
from trainer.config.reference import find, sections, settings
from trainer.config.schema import EDITOR_LINE, FILE_NAME, run_file_schema, schema_text
from trainer.runtime.errors import BadInput

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
VALIDATOR = jsonschema.Draft202012Validator(run_file_schema())


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems_of(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    path = written(tmp_path, text)
    with pytest.raises(BadInput) as caught:
        load(path, overrides)
    return [problem.replace(str(path), "FILE") for problem in caught.value.problems]


def schema_problems(path: Path) -> list[str]:
    data = yaml_source.read(path).data
    return [f"{error.json_path}: {error.message}" for error in VALIDATOR.iter_errors(data)]


# The reference


def test_the_reference_has_every_setting():
    listed = {name for name in settings() if not name.startswith("prompts.sweep.")}
    like = {name: section.like for name, section in sections().items() if section.like}
    for name in _all_settings(RunConfig):
        for again, first in like.items():
            name = re.sub(rf"^{again}\.", f"{first}.", name)
        listed.discard(name)
        assert name in settings(), name
    assert not listed


@pytest.mark.parametrize("setting", settings().values(), ids=lambda setting: setting.name)
def test_every_setting_has_a_meaning(setting):
    words = set(re.findall(r"[a-z0-9]+", setting.summary.lower()))
    words -= set(setting.leaf.split("_")) | {"the", "a", "of", "an", "its"}
    assert len(words) >= 2, setting.summary
    assert not setting.summary.endswith("."), "the first line is a phrase"
    assert (
        setting.required
        or setting.default is not None
        or setting.name in sections()
        or (setting.name.startswith("prompts.sweep."))
    )


@pytest.mark.parametrize("setting", settings().values(), ids=lambda setting: setting.name)
def test_choices_null_and_auto_are_explained(setting):
    if setting.name.startswith("prompts.init") or setting.name == "prompts.sweep.grid":
        return  # init: each field is a setting of its own
    choices = re.findall(r"[a-z0-9_]+", setting.type.split(" of ")[0].replace(" or ", ", "))
    words = {"true", "false", "number", "integer", "text", "path", "name", "mapping", "null"}
    words |= {"list", "these", "hf", "a", "size", "such", "as", "24gb", "above", "from", "below"}
    words |= {"to", "0", "1", "2", "24", "numbers"}
    expected = set(choices) - words
    if setting.default == "null":
        expected.add("null")
    assert expected <= set(setting.values), expected - set(setting.values)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("prompts.init", ["prompts.init"]),
        ("prompts[0].init", ["prompts.init"]),
        ("prompts.short.init.text", ["prompts.init.text"]),
        ("prompts[triage].init.text", ["prompts.init.text"]),
        ("learning_rate", ["prompts.learning_rate"]),
        ("every", ["evaluation.every", "checkpoint.every"]),
        ("init.from", ["prompts.init.from"]),
        ("tasks.validation.weight", ["tasks.train.weight"]),
        ("training", ["training"]),
        ("Learning-Rate", ["prompts.learning_rate"]),
    ],
)
def test_names_are_found(name, expected):
    assert find(name) == (expected, None)


def test_names_of_other_trainers_are_translated():
    assert find("lr")[0] == ["prompts.learning_rate"]
    assert find("--per-device-train-batch-size".lstrip("-"))[0] == ["training.tokens_per_step"]
    names, note = find("lora_r")
    assert names == ["prompts.num_virtual_tokens"]
    assert note.startswith("lora_r: promptshard trains prompts, not LoRA; ")


def test_values_are_found():
    names, note = find("adamw")
    assert (names, note) == (["prompts.optimizer"], "adamw is a value of prompts.optimizer")
    assert find("int8")[0] == ["base.quantization"], "another trainer's name comes first"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("", "'': unknown setting"),
        ("null", "'null': unknown setting"),
        ("learning_rte", "did you mean 'learning_rate'?"),
        ("prompts.nmu_virtual_tokens", "did you mean 'prompts.num_virtual_tokens'?"),
        ("xyz", "`promptshard settings` lists all"),
    ],
)
def test_unknown_names_are_refused(name, hint):
    with pytest.raises(BadInput, match=re.escape(hint)):
        find(name)


# The command


def test_the_overview_has_every_setting_in_80_columns():
    lines = [click.unstyle(line) for line in settings_text.overview(80)]
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    assert all(re.search(rf"(^|\s|\.){setting.leaf}\b", text) for setting in settings().values())
    joined = " ".join(text.split())
    assert all(setting.summary in joined for setting in settings().values())


@pytest.mark.parametrize("name", [name for name in sections() if name])
def test_sections_are_described_in_80_columns(name):
    lines = [click.unstyle(x) for x in settings_text.describe_section(sections()[name], 80)]
    assert max(map(len, lines)) <= 80
    joined = " ".join(" ".join(lines).split())
    for setting in sections()[name].settings:
        assert setting.name in joined
        assert setting.details in joined
        assert all(meaning in joined for meaning in setting.values.values())


def test_the_command_answers_and_refuses():
    known = promptshard("settings", "prompts[0].init.text")
    assert (known.returncode, known.stderr) == (0, "")
    assert "prompts.init.text" in known.stdout
    unknown = promptshard("settings", "learning_rte")
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert "did you mean 'learning_rate'?" in unknown.stderr


# The schema


def test_the_schema_is_valid():
    jsonschema.Draft202012Validator.check_schema(run_file_schema())


def test_the_schema_has_no_words_of_pydantic():
    assert not re.search(r'"(gt|ge|lt|le|title)": (?!"Run file)', schema_text())


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_and_their_resolved_files_match_the_schema(path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert path.read_text(encoding="utf-8").startswith(EDITOR_LINE + "\n")
    assert not schema_problems(path)
    assert not schema_problems(written(tmp_path, dump(load(path))))


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_init_match_the_schema(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scaffold_commands.init(kind, force=False)
    file = tmp_path / f"{kind}.yaml"
    assert file.read_text(encoding="utf-8").startswith(EDITOR_LINE + "\n")
    assert (tmp_path / FILE_NAME).read_text(encoding="utf-8") == schema_text()
    assert not schema_problems(file)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("train: train.jsonl", "train: hf://org/name"),
        ("train: train.jsonl", "train: [a.jsonl, {path: b.csv, max_rows: 5}]"),
        ("train: train.jsonl", "train: {hub: org/name, name: en, split: train}"),
        ("choices: [a, b]", "choices: [01, no, true]"),
        ("  steps: 10", "  steps: 10\n  micro_batch_tokens: 512"),
        ("  model: some/base", "  model: some/base\n  revision: null"),
        ("    task: triage", "    task: triage\n    init: vocab"),
        ("    task: triage", "    task: triage\n    init: {from: runs/other}"),
        ("    task: triage", "    task: triage\n    betas: [0.8, 0.99]"),
        ("    task: triage", "    sweep: {task: [triage], seed: [0, 1], random: 1}"),
        ("    task: triage", "    task: triage\n    sweep: {grid: {init: [vocab, auto]}}"),
        ("training:", "engine: {shard_group: 4, base_memory: 24GB, profile: {}}\ntraining:"),
        ("training:", "search: {halving: {first: 5}}\ntraining:"),
    ],
)
def test_the_schema_accepts_what_the_config_accepts(tmp_path, old, new):
    text = GOOD.replace(old, new)
    assert text != GOOD
    path = written(tmp_path, text)
    load(path)
    assert not schema_problems(path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("output_dir: runs/x\n", ""),
        ("    task: triage\n", ""),
        ("  steps: 10", "  steps: 0"),
        ("  steps: 10", "  steps: ten"),
        ("  steps: 10", "  steps: 10\n  lr: 0.1"),
        ("metric: accuracy", "metric: acuracy"),
        ("    task: triage", "    task: triage\n    encoder: mpl"),
        ("    task: triage", "    task: triage\n    learning_rate: -0.1"),
        ("    task: triage", "    task: triage\n    warmup_ratio: 1.5"),
        ("    task: triage", "    task: triage\n    dropout: 1"),
        ("    task: triage", "    task: triage\n    init: vocabulary"),
        ("    task: triage", "    task: triage\n    init: {text: x, vocab: true}"),
        ("    task: triage", "    task: triage\n    init: {}"),
        ("    task: triage", "    task: triage\n    sweep: {learning_rate: 0.1}"),
        ("    task: triage", "    task: triage\n    sweep: {sede: [1]}"),
        ("    task: triage", "    task: triage\n    sweep: {random: 0, seed: [1]}"),
        ("    task: triage", "    task: triage\n    sweep: {learning_rate: [-1]}"),
        ("    task: triage", "    task: triage\n    betas: [0.8]"),
        ("train: train.jsonl", "train: {path: a, hub: b}"),
        ("train: train.jsonl", "train: {weight: 2}"),
        ("train: train.jsonl", "train: []"),
        ("  - name: one", "  - name: a b"),
        ("training:", "engine: {base_memory: much}\ntraining:"),
        ("training:", "engine: {shard_group: 0}\ntraining:"),
        ("training:", "optimizer: adamw\ntraining:"),
    ],
)
def test_the_schema_refuses_what_the_config_refuses(tmp_path, old, new):
    text = GOOD.replace(old, new)
    assert text != GOOD
    assert problems_of(tmp_path, text)
    assert schema_problems(tmp_path / "run.yaml")


# Names of other trainers


def test_aliases_name_settings_and_hide_none():
    leaves = {setting.leaf for setting in settings().values()}
    for name, alias in all_aliases().items():
        assert {alias.setting, alias.see} <= {None, *settings()}, name
        assert alias.setting or alias.remedy, name
        section, _, leaf = name.rpartition(".")
        assert name not in settings(), name
        assert section or leaf not in leaves, f"{name} is a setting elsewhere"


def test_no_alias_is_listed_twice():
    rows = yaml_parser.parse((ROOT / "trainer/config/aliases.yaml").read_text("utf-8")).data
    names = [name for row in rows for name in row["names"].split()]
    assert sorted({name for name in names if names.count(name) > 1}) == []
    assert all(set(row) <= {"names", "setting", "see", "remedy"} for row in rows)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.lr=0.1", "training.lr: promptshard calls it prompts.learning_rate; leave it "),
        ("training.epochs=3", "training.epochs: promptshard calls it training.steps; in updates:"),
        ("prompts.one.lora_r=8", "prompts[0].lora_r: promptshard trains prompts, not LoRA; "),
        ("batch_size=8", "batch_size: promptshard calls it training.tokens_per_step; in text "),
        ("base.load_in_8bit=true", "promptshard calls it base.quantization; int8 is the default"),
        ("max_length=5", "max_length: rows may fill the base's context; tasks.too_long says "),
        ("training.logging_steps=1", "training.logging_steps: every step is logged; remove it"),
        (
            "prompts.one.init=What is this?",
            "prompts[0].init: 'What is this?' is not one of auto, search, vocab, labels, random, ",
        ),
        ("base.name=x", "base.name: promptshard calls it base.model"),
        ("evaluation.eval-steps=5", "promptshard calls it evaluation.every; in steps"),
        (
            "training.learning_rate=0.1",
            "training.learning_rate: unknown setting here; write prompts.learning_rate instead",
        ),
        (
            "task=x",
            "task: unknown setting here (did you mean 'tasks'?); known elsewhere: prompts.task",
        ),
        ("every=5", "every: unknown setting here; write evaluation.every or checkpoint.every "),
        ("prompts.one.sweep={lr: [0.1, 0.2]}", "sweep.lr: promptshard calls it prompts.learning"),
    ],
)
def test_unknown_names_are_translated_in_a_run_file(tmp_path, override, expected):
    (problem,) = problems_of(tmp_path, GOOD, override)
    assert expected in problem


def test_json_output_is_a_list_of_settings():
    done = promptshard("settings", "prompts.init", "--json")
    names = [item["name"] for item in json.loads(done.stdout)]
    assert names[0] == "prompts.init"
    assert "prompts.init.text" in names
