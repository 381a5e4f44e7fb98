"""README and docs/, as a new user follows them: every command, in order, in an empty folder.

The first run is the quickstart itself, in full: what it promises is asserted here. The other
commands run with libraries imported (tests/preloaded_commands.py). A command that several documents
name is run once. tests/unit/test_shipped_files.py checks links and run files.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from launch.launcher_command import free_port
from tests import golden, preloaded

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
#: Its commands need the model and the rows of the one before:
#: tests/integration/test_smollm2_example.py.
IN_ORDER = ROOT / "docs" / "from-words-to-virtual-tokens.md"
DOCUMENTS = [
    ROOT / "README.md",
    *(path for path in sorted((ROOT / "docs").glob("*.md")) if path != IN_ORDER),
]
QUICKSTART = "promptshard train examples/quickstart.yaml"
INSPECT = "promptshard inspect runs/quickstart --prune"
SERVE = "promptshard serve runs/quickstart"
#: Commands that other tests run: one needs a long training (tests/unit/test_pass_at_k.py), one
#: downloads a model (tests/integration/test_smollm2_example.py), one needs a hub
#: (tests/unit/test_push.py).
ELSEWHERE = {
    "promptshard evaluate runs/codegen --metric pass@5 --n-samples 10 --temperature 0.8",
    "promptshard example smollm2 work",
    "promptshard push runs/quickstart me/triage-prompt --prompt triage --private "
    "--base-model me/tiny-base",
}
#: Trainings after the first are cut short, each into a folder of its own. What a prompt is compared
#: with, and on all rows, the first has shown. It also ran on two ranks; others run on one.
SHORT = ["training.steps=2", "evaluation.every=50"]
SHORT_TASK = ["tasks[{}].hand_written=[]", "tasks[{}].max_validation_rows=20"]


def blocks(language: str) -> list[str]:
    """Fenced blocks of all documents, each distinct one once."""
    text = "".join(path.read_text(encoding="utf-8") for path in DOCUMENTS)
    return list(dict.fromkeys(re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)))


def commands(program: str) -> list[str]:
    lines = "".join(blocks("bash")).splitlines()
    all_commands = dict.fromkeys(line.split("   #")[0].strip() for line in lines)
    return [command for command in all_commands if command.split(" ")[0] == program]


#: ``mlflow models predict``, which needs a registered model.
PREDICT = [command for command in commands("mlflow") if " predict " in command]


class Folder:
    """A working folder with the examples, in which commands run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        for name in ("examples", "ds_configs"):
            (path / name).symlink_to(ROOT / name)
        (path / "hosts").write_text("localhost slots=1\n")
        kept = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
        paths = os.pathsep.join([str(BIN), os.environ["PATH"]])
        self.environment = kept | {"PATH": paths, "PYTHONPATH": str(ROOT)}

    def run(self, *words: str, timeout: float = 400) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            words,
            cwd=self.path,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def promptshard(self, *words: str, timeout: float = 400) -> subprocess.CompletedProcess[str]:
        """Run a command with libraries imported; the quickstart imports them as a user does."""
        return preloaded.run(
            *("tests.preloaded_commands", *words),
            environ=self.environment | {"OMP_NUM_THREADS": "1"},  # of tiny models
            timeout=timeout,
            cwd=self.path,
        )

    def summary(self, output: str) -> Any:
        return json.loads((self.path / output / "summary.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Run the quickstart in a new folder."""
    folder = Folder(tmp_path_factory.mktemp("readme"))
    assert QUICKSTART in commands("promptshard")
    done = folder.run(*shlex.split(QUICKSTART), timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    folder.output = done.stdout  # type: ignore[attr-defined]
    return folder


@pytest.mark.timeout(1000)
def test_quickstart_reaches_the_accuracy_the_readme_states(folder: Folder) -> None:
    summary = folder.summary("runs/quickstart")
    for task in ("triage", "animals"):
        trained = summary["prompts"][task]["validation_accuracy"]
        baseline = summary["tasks"][task]
        assert baseline["no_prompt"]["validation_accuracy"] < 0.5
        assert trained >= 0.9
        assert trained > max(s["validation_accuracy"] for s in baseline["hand_written"])


def test_quickstart_has_its_golden_losses(folder: Folder) -> None:
    golden.compare("quickstart", folder.path / "runs" / "quickstart")


def test_quickstart_prints_the_next_commands(folder: Folder) -> None:
    output: str = folder.output  # type: ignore[attr-defined]
    for line in ("report.html", "mlflow ui", "promptshard generate"):
        assert line in output


@pytest.mark.parametrize("command", commands("promptshard") + commands("deepspeed"))
def test_command(folder: Folder, command: str, request: pytest.FixtureRequest) -> None:
    words = shlex.split(command)
    if command == QUICKSTART:
        return  # the fixture has run it
    if command in ELSEWHERE or command in (INSPECT, SERVE):
        return  # other tests of this file run INSPECT and SERVE
    if "train" in words or words[0] == "deepspeed":
        output = f"runs/{abs(hash(command))}"
        tasks = (0, 1) if "quickstart" in command else (0,)
        short = SHORT + [setting.format(task) for setting in SHORT_TASK for task in tasks]
        words = [word for word in words if not word.startswith("training.steps=")]
        words += [*short, f"output_dir={output}"]
    if words[1] in ("evaluate", "generate", "inspect"):
        words += ["--processes", "1"]
    if words[1] in ("evaluate", "inspect"):
        words += ["--rows", "20"]
    if "submit" in words:  # tests/slurm has a Slurm
        words.append("--dry-run")
    program, *arguments = words
    done = folder.promptshard(*arguments) if program == "promptshard" else folder.run(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    if words[1] == "generate":
        # Angina is cardiac, and insulin metabolic: the prompt asks for the illness.
        assert done.stdout == "cardiac\n"


@pytest.mark.timeout(1000)
def test_predictions_are_those_of_the_training(folder: Folder) -> None:
    (command,) = (line for line in commands("promptshard") if " predict " in line)
    done = folder.promptshard(*shlex.split(command)[1:])
    assert done.returncode == 0, done.stdout + done.stderr
    records, trained = (
        [json.loads(line) for line in (folder.path / name).read_text().splitlines()]
        for name in ("triage.jsonl", "runs/quickstart/predictions/triage.jsonl")
    )
    assert [record["row"] for record in records] == [record["row"] for record in trained]
    for record, before in zip(records, trained, strict=True):
        made = record["triage"]
        assert made["prediction"] == before["prediction"]
        assert made["scores"] == pytest.approx(before["scores"], abs=1e-3)
        assert made["nll"] == pytest.approx(before["loss"], abs=1e-4)


def test_inspection_of_the_quickstart(folder: Folder) -> None:
    """What prompts elicit is above their controls; one rank finds the same as two."""
    assert INSPECT in commands("promptshard")
    few = ["--rows", "48"]
    done = folder.promptshard(*shlex.split(INSPECT)[1:], *few, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    two = json.loads((folder.path / "runs/quickstart/inspection.json").read_text())
    for name, prompt in two["prompts"].items():
        controls = prompt["controls"]
        assert set(controls) == {"random", "initial", "other_task"}
        for control in controls.values():
            assert prompt["class_rate"] >= control["class_rate"] + (name == "triage") / 3
            assert prompt["loss"] < control["loss"]
        assert [saved["step"] for saved in prompt["checkpoints"]] == [20, 40, 60]
        assert all(token["drift"] > 0 for token in prompt["tokens"])
        if prompt["pruned"]["dropped"]:
            adapter = prompt["pruned"]["adapter"]
            saved = json.loads((folder.path / adapter / "adapter_config.json").read_text())
            assert saved["num_virtual_tokens"] == prompt["pruned"]["num_virtual_tokens"]
    one_rank = ["--processes", "1", "--json", "one.json"]
    done = folder.promptshard("inspect", "runs/quickstart", *few, *one_rank, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    one = json.loads((folder.path / "one.json").read_text())
    for name, prompt in one["prompts"].items():
        assert prompt["class_rate"] == two["prompts"][name]["class_rate"]
        for ours, theirs in zip(prompt["tokens"], two["prompts"][name]["tokens"], strict=True):
            for key in ("norm", "drift", "leave_one_out", "gradient_times_input", "attention"):
                assert ours[key] == pytest.approx(theirs[key], abs=1e-4), key


def test_mlflow_predicts_with_a_registered_prompt(folder: Folder) -> None:
    (command,) = PREDICT
    register = next(c for c in commands("promptshard") if "--register" in c)
    done = folder.promptshard(*shlex.split(register)[1:])
    assert done.returncode == 0, done.stdout + done.stderr
    (rows,) = (text for text in blocks("json") if "dataframe_records" in text)
    (folder.path / "rows.json").write_text(rows)
    done = folder.run(*shlex.split(command))
    assert done.returncode == 0, done.stderr
    (prediction,) = json.loads(done.stdout[done.stdout.index('{"predictions"') :])["predictions"]
    assert prediction["prediction"] in prediction["probabilities"]


@pytest.mark.parametrize("command", [c for c in commands("mlflow") if c not in PREDICT])
def test_mlflow_shows_the_run(folder: Folder, command: str) -> None:
    port = "5997"
    server = subprocess.Popen(
        [*shlex.split(command), "--port", port],
        cwd=folder.path,
        env=folder.environment | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},  # seven processes
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        url = f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/get-by-name"
        answer = poll(f"{url}?experiment_name=quickstart")
        assert answer["experiment"]["name"] == "quickstart"
    finally:
        os.killpg(server.pid, 9)
        server.wait()


def poll(url: str) -> Any:
    deadline = time.monotonic() + 90
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                return json.load(answer)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(1)


@pytest.mark.parametrize("snippet", [text for text in blocks("python") if "openai" not in text])
def test_python(folder: Folder, snippet: str) -> None:
    done = folder.run(sys.executable, "-c", snippet)
    assert done.returncode == 0, done.stderr


def accept_ctrl_c() -> None:
    """Undo what children inherit of SIGINT, which background jobs of a shell may ignore."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def test_clients_of_the_server(folder: Folder) -> None:
    """The curl command and the snippet get answers; Ctrl-C ends the server with exit code 0."""
    port = str(free_port())
    words = [*SERVE.split(), "--port", port, "--processes", "1"]
    server = subprocess.Popen(
        words,
        cwd=folder.path,
        env=folder.environment,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=accept_ctrl_c,
    )
    try:
        assert server.stdout is not None
        assert any(port in line for line in server.stdout), "it has ended"
        (snippet,) = (text for text in blocks("python") if "openai" in text)
        done = folder.run(sys.executable, "-c", snippet.replace("8000", port))
        assert done.returncode == 0, done.stderr
        (curl,) = commands("curl")
        answer = folder.run("bash", "-c", curl.replace("8000", port))
        text = json.loads(answer.stdout)["choices"][0]["text"]
        assert text.strip()
        assert done.stdout.startswith(text)
        server.send_signal(signal.SIGINT)
        assert server.wait(60) == 0
    finally:
        server.kill()
        server.wait()
