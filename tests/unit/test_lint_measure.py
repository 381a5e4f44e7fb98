"""``promptshard lint --measure``: rewritten texts, how they are read, and their effects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from typer.testing import CliRunner

from launch import lint_command
from launch.commands import app
from launch.exit_report import ExitReport
from tests.unit.test_evaluate_arms import BASE, CHOICES, make_run
from trainer.commands.evaluate.rows import RowEncoder
from trainer.commands.lint.effects import measured
from trainer.commands.lint.options import Options, parse
from trainer.commands.lint.selection import check
from trainer.commands.lint.texts import arm_name, arm_of
from trainer.config import RunConfig, dump
from trainer.data.task_data import EvalSet, load_tasks
from trainer.data.tokenization.tokenize import no_progress
from trainer.evaluation.lint.finding import Finding
from trainer.evaluation.lint.instructions import instructions_of
from trainer.evaluation.lint.results import LintResults
from trainer.evaluation.lint.rewrites import apply_all, rewrites

BAD = "Please describe the diet. Please name several animals, e.g. lions, and compare them."


WITHOUT_VALIDATION = [
    f"tasks[0].{setting}"
    for setting in ("validation=null", "validation_share=0", "hand_written=[]")
]


def finding(text: str, part: str, rewrite: str, rule: str = "r", *, ready: bool = True) -> Finding:
    start = text.index(part)
    return Finding(rule, start, start + len(part), "", rewrite, ready)


class TestRewrites:
    def test_all_texts_to_score(self) -> None:
        text = "Please answer, please. Use KPIs.\n"
        findings = [
            finding(text, "Please ", "", "filler"),
            finding(text, ", please", "", "filler"),
            finding(text, "KPIs", "KPIs (written out)", "undefined-term", ready=False),
        ]
        texts = rewrites(text, findings)
        assert texts.by_finding == (
            "Answer, please. Use KPIs.\n",
            "Please answer. Use KPIs.\n",
            None,
        )
        assert texts.by_rule == {"filler": "Answer. Use KPIs.\n"}
        assert texts.together == "Answer. Use KPIs.\n"
        assert len(texts.texts) == 4, "distinct ones"

    def test_nothing_to_score(self) -> None:
        texts = rewrites("A KPI.", [finding("A KPI.", "KPI", "?", ready=False)])
        assert (texts.by_rule, texts.together, texts.texts) == ({}, None, ["A KPI."])

    def test_of_overlapping_rewrites_the_longer_part_is_changed(self) -> None:
        text = "Name it, and list two of them."
        inner, outer = finding(text, "two", "three"), finding(text, ", and list two of them", "")
        assert apply_all(text, [inner, outer]) == "Name it."

    def test_the_same_addition_of_two_rules_is_made_once(self) -> None:
        added = [Finding(rule, 5, 5, "", " Answer a or b.") for rule in ("x", "y")]
        assert apply_all("Why?\n", [Finding("x", 4, 4, "", " Answer a.")]) == "Why? Answer a.\n"
        assert apply_all("Text.", added) == "Text. Answer a or b."


def with_long_prompt(config: RunConfig) -> RunConfig:
    """Make room for all texts, which the short prompt of the run does not hold."""
    (prompt,) = config.prompts
    longer = prompt.model_copy(update={"num_virtual_tokens": 100})
    return config.model_copy(update={"prompts": [longer]})


def load(config: RunConfig) -> dict[str, Any]:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    return load_tasks(config.model_copy(update={"prompts": []}), tokenizer, 512, len(tokenizer))


def encoder() -> RowEncoder:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    return RowEncoder(tokenizer, 512, len(tokenizer), None, (), no_progress)


def tokens(rows: EvalSet) -> list[tuple[Any, ...]]:
    return [(example.input_ids, example.label_spans) for row in rows.candidates for example in row]


def test_a_text_is_read_as_promptshard_evaluate_reads_a_hand_written_prompt(
    tmp_path: Path,
) -> None:
    config = make_run(tmp_path, hand_written=[BAD])
    data = load(config)["diet"]
    (instruction,) = instructions_of(config)
    plain = data.evaluation["validation"]
    arm = arm_of(instruction, BAD, plain, encoder(), "accuracy")
    assert tokens(arm.rows) == tokens(data.hand_written["validation"][0])
    assert (arm.rows.gold, arm.numbers) == (plain.gold, plain.row_numbers)
    other = arm_of(instruction, "Which diet? ", plain, encoder(), "accuracy")
    assert other.name != arm.name
    assert tokens(other.rows) != tokens(arm.rows)


def test_a_text_of_the_system_replaces_that_of_the_task(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"chat": True, "target": "{label}", "hand_written": []}
    config = make_run(tmp_path, **settings, system="Old.")
    (instruction,) = instructions_of(config)
    plain = load(config)["diet"].evaluation["validation"]
    arm = arm_of(instruction, "Which diet?", plain, encoder(), "accuracy")
    wanted = load(make_run(tmp_path, **settings, system="Which diet?"))["diet"]
    assert tokens(arm.rows) == tokens(wanted.evaluation["validation"])
    assert arm_name(instruction, "x").startswith("system-")


def test_effects_are_paired_differences_to_the_original(tmp_path: Path) -> None:
    config = with_long_prompt(make_run(tmp_path, hand_written=[BAD]))
    (instruction,) = instructions_of(config)
    checked = check(instruction)
    texts = rewrites(BAD, checked.findings)
    correct = {text: [False] * 20 for text in texts.texts}
    assert texts.together is not None
    correct[texts.together] = [True] * 10 + [False] * 10
    records = {
        text: [{"row": i + 1, "correct": value} for i, value in enumerate(values)]
        for text, values in correct.items()
    }
    result = measured(checked, texts, records.__getitem__, config.tasks[0], "accuracy")
    assert (result.metric, result.rows, result.score) == ("accuracy", 20, 0.0)
    assert result.rewritten_effect is not None
    assert (result.rewritten_effect.difference, result.rewritten_effect.score) == (0.5, 0.5)
    assert result.rewritten_effect.low is not None
    assert 0 < result.rewritten_effect.low < 0.5
    assert set(result.rules) == {f.rule for f in checked.findings if f.measurable}
    for part in result.findings:
        assert (part.effect is None) == (not part.measurable)
        assert part.effect is None or part.effect.difference == 0.0


class TestCommand:
    @pytest.fixture
    def run_file(self, tmp_path: Path) -> Path:
        path = tmp_path / "run.yaml"
        path.write_text(dump(with_long_prompt(make_run(tmp_path, hand_written=[BAD]))))
        return path

    def run(self, *arguments: str) -> Any:
        return CliRunner().invoke(app, ["lint", *arguments])

    def test_the_output_states_the_effect_of_every_rule(
        self, run_file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def score(module: str, arguments: list[str], folder: str, *_: object) -> ExitReport:
            """Stand in for the ranks: the rewrites of one rule are right on 8 more rows of 40."""
            assert module == "trainer.commands.lint"
            options = parse(arguments)
            assert options == Options(str(run_file), rows=40)
            config = lint_command.load(options.run_file)
            (each,) = lint_command.checked_instructions(config, options)
            texts = rewrites(BAD, each.findings)
            better = {texts.by_rule["filler"], texts.together}

            def records(text: str) -> list[dict[str, Any]]:
                right = 28 if text in better else 20
                return [{"row": i + 1, "correct": i < right} for i in range(40)]

            result = measured(each, texts, records, config.tasks[0], "accuracy")
            path = Path(folder) / "lint.json"
            path.parent.mkdir(parents=True)
            path.write_text(LintResults(prompts=[result]).model_dump_json())
            return ExitReport(0, "")

        monkeypatch.setattr(lint_command, "start_ranks", score)
        result = self.run(str(run_file), "--measure", "--rows", "40", "--json", "-")
        assert result.exit_code == 0, result.output
        (prompt,) = json.loads(result.stdout)["prompts"]
        assert prompt["rules"]["filler"]["difference"] == pytest.approx(0.2)
        shown = self.shown(run_file, monkeypatch)
        assert "accuracy 50.0% on 40 validation rows" in shown
        assert "rule filler: +20.0 points [+" in shown
        assert "rule split-requests: no effect shown on this base: +0.0 points [" in shown
        assert "all rewrites together: +20.0 points" in shown
        assert "with 80% power" in shown

    def shown(self, run_file: Path, monkeypatch: pytest.MonkeyPatch) -> str:
        path = lint_command.results_folder(str(run_file.parent)) / "lint.json"
        monkeypatch.setattr(lint_command, "start_ranks", lambda *_: ExitReport(0, ""))
        assert path.is_file()
        output = self.run(str(run_file), "--measure", "--rows", "40").output
        return " ".join(str(output).split())

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--text", "a b", "--measure"], "name the RUN.yaml, too"),
            (["RUN", "--rows", "9"], "--rows: is used with --measure only"),
            (["RUN", "--measure", "--metric", "acuracy"], "did you mean 'accuracy'"),
            (["RUN", "--measure", "--metric", "f1"], "--metric: f1 compares sets of labels"),
            (
                ["RUN", "--measure", "--text", BAD, *WITHOUT_VALIDATION],
                "tasks.diet: has no validation rows to measure on",
            ),
            (["RUN", "--measure", "base.model=./none"], "base.model: ./none: no such folder"),
            (["RUN", "--task", "dite"], "has no task 'dite' (did you mean 'diet'?)"),
        ],
    )
    def test_bad_input(self, run_file: Path, arguments: list[str], message: str) -> None:
        result = self.run(*(word.replace("RUN", str(run_file)) for word in arguments))
        assert message in str(result.exception)

    def test_a_text_without_findings_starts_no_ranks(
        self, run_file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(lint_command, "start_ranks", None)
        good = f"What does the animal eat? Answer {', '.join(CHOICES[:2])} or {CHOICES[2]}."
        result = self.run(str(run_file), "--measure", "--text", good)
        assert result.exit_code == 0, result.output
        assert "no findings" in result.output
        assert "nothing to measure: no rule found anything in the text" in result.output
        unready = self.run(str(run_file), "--measure", "--text", f"{good} Use no KPIs.")
        assert unready.exit_code == 0, unready.output
        assert "undefined-term" in " ".join(unready.output.split())
        assert "no rewrite (undefined-term) is ready to use" in " ".join(unready.output.split())

    def test_a_request_that_cannot_be_measured_is_refused_without_findings_too(
        self, run_file: Path
    ) -> None:
        good = f"What does the animal eat? Answer {', '.join(CHOICES[:2])} or {CHOICES[2]}."
        given = (str(run_file), "--measure", "--text", good)
        result = self.run(*given, "--metric", "execution")
        assert "--metric: execution needs a task with metric: execution" in str(result.exception)
        result = self.run(*given, *WITHOUT_VALIDATION)
        assert "tasks.diet: has no validation rows to measure on" in str(result.exception)
