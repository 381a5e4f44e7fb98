"""``promptshard predict``: refused inputs, and an output file that survives interruptions."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.command_line import promptshard
from tests.unit.saved_run import ROWS, save_run
from trainer.commands.predict.output_file import OutputFile
from trainer.commands.predict.plan import Options, make_plan
from trainer.runtime.errors import BadInput

IDENTITY = {"prompts": {"a": "1"}, "data": "2"}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return save_run(tmp_path / "run")


def options(run: Path, *prompts: str) -> Options:
    return Options(run, prompts, str(run.parent / "rows.jsonl"), run.parent / "out.jsonl")


@pytest.mark.parametrize("torn", ["", '{"row": 3, "a', '{"row": 3}'])
def test_an_interrupted_file_continues_after_its_last_complete_line(
    tmp_path: Path, torn: str
) -> None:
    output = OutputFile(tmp_path / "out.jsonl")
    assert output.open(IDENTITY, fresh=False) == 0
    output.append([{"row": 1}, {"row": 2, "a": "ä\u2028"}])
    with output.path.open("a", encoding="utf-8") as file:
        file.write(torn)
    assert output.open(IDENTITY, fresh=False) == 2
    output.append([{"row": 3}])
    lines = output.path.read_text(encoding="utf-8").split("\n")
    assert [json.loads(line)["row"] for line in lines[:-1]] == [1, 2, 3]


def test_a_file_larger_than_a_block_continues(tmp_path: Path) -> None:
    output = OutputFile(tmp_path / "out.jsonl")
    output.open(IDENTITY, fresh=False)
    output.append([{"row": row, "a": "x" * 100_000} for row in range(1, 31)])
    output.append([{"row": 31, "a": "x" * 3_000_000}])
    assert output.open(IDENTITY, fresh=False) == 31


def test_a_file_of_other_inputs_is_refused(tmp_path: Path) -> None:
    output = OutputFile(tmp_path / "out.jsonl")
    output.open(IDENTITY, fresh=False)
    output.append([{"row": 1}])
    with pytest.raises(BadInput, match="has predictions of other data; name another"):
        output.check(IDENTITY | {"data": "3"}, fresh=False)
    assert output.open(IDENTITY | {"data": "3"}, fresh=True) == 0
    assert output.open(IDENTITY, fresh=False) == 0, "without a line, nothing is lost"
    assert output.open(IDENTITY | {"data": "3"}, fresh=False) == 0
    output.path.write_text('{"row": 5}\n')
    with pytest.raises(BadInput, match=r"out\.jsonl:1: is not the prediction for row 1"):
        output.open(IDENTITY | {"data": "3"}, fresh=False)
    output.about.unlink()
    with pytest.raises(BadInput, match="it is not known what wrote it"):
        output.check(IDENTITY, fresh=False)


def test_a_finished_file_starts_nothing(run: Path) -> None:
    given = options(run, "short")
    plan = make_plan(given)
    output = OutputFile(given.out)
    output.open(plan.identity(given), fresh=False)
    output.append({"row": row} for row in range(1, plan.num_rows + 1))
    done = promptshard("predict", *given.arguments())
    assert done.returncode == 0
    assert "has all 5 rows already" in done.stderr
    assert "starting" not in done.stderr


def test_two_commands_do_not_write_one_file(tmp_path: Path) -> None:
    output = OutputFile(tmp_path / "out.jsonl")
    refused = pytest.raises(BadInput, match="another command writes")
    with output.locked(), refused, OutputFile(output.path).locked():
        pass


def test_the_output_depends_on_prompts_and_rows(run: Path) -> None:
    identity = make_plan(options(run, "short")).identity(options(run, "short"))
    assert make_plan(options(run, "long")).identity(options(run, "long")) != identity
    (run.parent / "rows.jsonl").write_text('{"text": "another"}\n')
    assert make_plan(options(run, "short")).identity(options(run, "short")) != identity


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--prompt", "shrt", "lng"], "has no prompt 'lng' (did you mean 'long'?)"),
        ([], "the run has triage, free; name the prompts with --prompt"),
        (["short"], "short: is not expected; name prompts with --prompt short"),
        (["--prompt", "short", "--out", "{}/none/out.jsonl"], "--out: cannot write into"),
        (["--prompt", "short", "--out", "{}/rows.jsonl", "--fresh"], "is the file of --data"),
        (["--prompt", "short", "--out", "{}/run/run.yaml"], "it is not known what wrote it"),
        (["--prompt", "short", "--data", "{}/row.jsonl"], "did you mean 'rows.jsonl'?"),
        (["--prompt", "unfinished"], "prompt 'unfinished' is not saved yet"),
    ],
)
def test_mistakes_are_reported_before_anything_starts(
    run: Path, arguments: list[str], problem: str
) -> None:
    folder = run.parent
    words = [word.replace("{}", str(folder)) for word in arguments]
    data = [] if "--data" in words else ["--data", folder / "rows.jsonl"]
    out = [] if "--out" in words else ["--out", folder / "out.jsonl"]
    done = promptshard("predict", run, *words, *data, *out)
    assert done.returncode == 2
    assert problem in " ".join(done.stderr.split())
    assert "starting" not in done.stderr
    assert not (folder / "out.jsonl").exists()


@pytest.mark.parametrize(
    ("row", "has_remedy"),
    [({"text": "fever", "label": "plants"}, True), ({"txt": "fever", "label": "plants"}, False)],
)
def test_wrong_targets_name_the_option_that_ignores_them(
    run: Path, row: dict[str, str], has_remedy: bool
) -> None:
    (run.parent / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(BadInput) as refused:
        make_plan(options(run, "short"))
    assert ("--ignore-targets" in str(refused.value)) == has_remedy
    if has_remedy:
        make_plan(replace(options(run, "short"), ignore_targets=True))
