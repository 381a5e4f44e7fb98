"""Complete runs from the command line on the tiny base, from run file to PEFT adapter."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from launch.launcher_command import free_port
from tests import command_line, preloaded
from tests.distributed.conftest import run_module
from tests.hub_cache import TINY, fill_cache
from trainer.runtime import bootstrap
from trainer.runtime.errors import EXIT_PORT_TAKEN

ROOT = Path(__file__).resolve().parents[2]
STEPS = 8


def promptshard(
    *arguments: str, cwd: Path = ROOT, **variables: str
) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")} | variables
    return subprocess.run(
        [sys.executable, bootstrap.FILE, "launch", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


def one_process(module: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run ``python -m MODULE`` as the only rank: like ``--processes 1``, without a launcher."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
    own = {"MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"} | variables
    return preloaded.run(module, *arguments, environ=kept | own)


def two_processes(folder: Path, module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``python -m MODULE`` on two ranks without a launcher; output is that of rank 0."""
    logs = [folder / f"{module}-{rank}.log" for rank in range(2)]
    for log in logs:
        log.unlink(missing_ok=True)
    codes = run_module(module, *arguments, logs=logs)
    assert codes[0] == codes[1], [log.read_text() for log in logs]
    text = logs[0].read_text()
    return subprocess.CompletedProcess([module, *arguments], codes[0] or 0, text, text)


def write_run_file(folder: Path) -> Path:
    """Write the quickstart's first task with one prompt of each method and few steps."""
    run = yaml.safe_load((ROOT / "examples" / "quickstart.yaml").read_text())
    run["output_dir"] = str(folder / "run")
    run["tracking"] = run.get("tracking", {}) | {"uri": f"sqlite:///{folder}/mlflow.db"}
    run["tasks"] = run["tasks"][:1]
    task = run["tasks"][0]
    for split, rows in (("train", 200), ("validation", 40)):
        lines = (ROOT / task[split]).read_text().splitlines()[:rows]
        task[split] = str(folder / f"{split}.jsonl")
        Path(task[split]).write_text("\n".join(lines) + "\n")
    task.pop("shifted_validation", None)
    task["hand_written"] = task["hand_written"][:1]
    run["prompts"] = [
        {"name": "soft", "task": task["name"], "num_virtual_tokens": 5, "init": "random"},
        {
            **{"name": "mlp", "task": task["name"], "method": "p_tuning", "num_virtual_tokens": 8},
            **{"optimizer": "adafactor", "ema": 0.9, "noise": 0.05, "dropout": 0.05},
        },
        {"name": "prefix", "task": task["name"], "method": "prefix_tuning", "learning_rate": 0.005},
    ]
    run["training"] = {"steps": STEPS, "tokens_per_step": 512, "micro_batch_tokens": 300}
    run["evaluation"] = {"every": STEPS // 2}
    run["checkpoint"] = {"every": STEPS // 2}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    return path


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run_file(tmp_path_factory.mktemp("run"))


#: Names of files in the working directory that must replace nothing.
DECOYS = ("trainer/__init__", "launch/__init__", "deepspeed/__init__", "json", "torch", "sklearn")


@pytest.fixture(scope="module")
def two_ranks(run_file: Path) -> Path:
    decoys = run_file.parent / "decoys"
    for name in DECOYS:
        path = decoys / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"open({str(decoys / 'ran')!r}, 'a').write({name!r})\nraise SystemExit\n")
    done = promptshard("train", str(run_file), "--processes", "2", cwd=decoys)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (decoys / "ran").exists()
    return run_file.parent / "run"


@pytest.fixture(scope="module")
def one_rank(run_file: Path) -> Path:
    output = run_file.parent / "one"
    automatic = "training.micro_batch_tokens=auto"
    done = one_process("trainer", str(run_file), f"output_dir={output}", automatic)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "packed batches of up to" in (output / "logs" / "rank-0.log").read_text()
    return output


def summary(output: Path) -> Any:
    return json.loads((output / "summary.json").read_text())


def lines(output: Path) -> list[Any]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_one_rank_and_two_agree(two_ranks: Path, one_rank: Path) -> None:
    two, one = summary(two_ranks), summary(one_rank)
    assert (two["world_size"], one["world_size"]) == (2, 1)
    for name in ("soft", "mlp", "prefix"):
        loss = two["prompts"][name]["validation_loss"]
        assert loss == pytest.approx(one["prompts"][name]["validation_loss"], abs=1e-3)


def test_batches_are_as_long_as_a_step_needs(two_ranks: Path, one_rank: Path) -> None:
    given, automatic = summary(two_ranks)["memory"], summary(one_rank)["memory"]
    assert given["stream_tokens"] == 300
    assert 2 * 512 < automatic["stream_tokens"] < 4 * 512  # two prompts, one rank
    for memory in (given, automatic):
        assert memory["gradient_checkpointing"] is False
        assert memory["saved_bytes_per_token"] > memory["saved_bytes_per_token_and_layer"] > 0


def test_loss_falls(two_ranks: Path) -> None:
    losses = [
        line["metrics"]["train_loss"]
        for line in lines(two_ranks)
        if line["prompt"] == "soft" and "train_loss" in line["metrics"]
    ]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0]


def test_a_prefix_learns_the_task(run_file: Path) -> None:
    """From keys and values of a text; the best hand-written prompt scores 0.2."""
    run = yaml.safe_load(run_file.read_text())
    run["output_dir"] = str(run_file.parent / "learns")
    text = {"text": "What is wrong with this patient?"}
    run["prompts"] = [run["prompts"][2] | {"init": text, "learning_rate": 0.03}]
    run["training"] = {"steps": 25, "tokens_per_step": 1024}
    run["evaluation"] = {"every": 25}
    path = run_file.parent / "learns.yaml"
    path.write_text(yaml.safe_dump(run))
    done = one_process("trainer", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    results = summary(Path(run["output_dir"]))
    assert results["prompts"]["prefix"]["validation_accuracy"] > 0.9
    assert results["tasks"]["triage"]["no_prompt"]["validation_accuracy"] < 0.3
    assert "Prompt prefix (" in done.stdout
    assert "beats the best baseline (always " in done.stdout, "the first line of the result"


def test_output_folder(two_ranks: Path) -> None:
    for name in ("run.yaml", "metrics.jsonl", "report.html", "environment.json", "../mlflow.db"):
        assert (two_ranks / name).stat().st_size > 0, name
    environment = json.loads((two_ranks / "environment.json").read_text())
    assert environment["start_options"] == "--processes 2"
    assert sorted(p.name for p in (two_ranks / "checkpoints").iterdir()) == [
        f"step-{STEPS // 2:08d}",
        f"step-{STEPS:08d}",
    ]
    results = summary(two_ranks)
    gathered, exchanged = results["communication"].values()
    assert gathered > exchanged > 0
    assert results["throughput"]["useful_tokens_per_second"] > 0
    expected = summary_of_one_base(two_ranks)
    assert results["memory"]["base_bytes_per_rank"] < 0.6 * expected


def test_predictions_are_those_of_the_scores(two_ranks: Path) -> None:
    results = summary(two_ranks)
    scored = dict(results["prompts"])
    of_task = results["tasks"]["triage"]
    for name in ("no_prompt", "majority"):
        scored[f"baselines/triage/{name}"] = of_task[name]
    assert of_task["rows"] == {"validation": 40}
    assert of_task["comparison"]["rows"] == 40
    for name, scores in scored.items():
        path = two_ranks / "predictions" / f"{name}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert sum(row["correct"] for row in rows) / 40 == scores["validation_accuracy"], name
        assert {row["step"] for row in rows} == {scores.get("best_step", 0)}
        if "validation_loss" in scores:
            loss = sum(row["loss"] for row in rows) / sum(row["tokens"] for row in rows)
            assert loss == pytest.approx(scores["validation_loss"])


def summary_of_one_base(output: Path) -> int:
    """Bytes of the tiny base's file: an upper bound for one rank."""
    model = yaml.safe_load((output / "run.yaml").read_text())["base"]["model"]
    return (ROOT / model / "model.safetensors").stat().st_size


@pytest.mark.fault("resume in mid-epoch and mid-accumulation")
def test_resumed_equals_uninterrupted(run_file: Path, two_ranks: Path) -> None:
    output = run_file.parent / "resumed"
    shutil.copytree(two_ranks, output, ignore=shutil.ignore_patterns("logs"))
    shutil.rmtree(output / "checkpoints" / f"step-{STEPS:08d}")
    for name in ("summary.json", "tracking.json"):
        (output / name).unlink(missing_ok=True)
    done = two_processes(run_file.parent, "trainer", str(run_file), f"output_dir={output}")
    assert done.returncode == 0, done.stdout
    assert f"resuming from step {STEPS // 2}/{STEPS}" in done.stdout
    final = f"checkpoints/step-{STEPS:08d}/state.safetensors"
    before, after = load_file(two_ranks / final), load_file(output / final)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    steps = [(line["step"], line["prompt"], *line["metrics"]) for line in lines(output)]
    assert len(steps) == len(set(steps)), "a step was logged twice"


@pytest.mark.fault("resume with another base, tokenizer, dtype, length, template or method")
def test_a_run_with_other_settings_is_refused(run_file: Path, two_ranks: Path) -> None:
    done = one_process("trainer", str(run_file), "prompts.soft.learning_rate=0.5")
    assert done.returncode == 2
    assert "prompts.soft.learning_rate: is 0.5, but" in done.stderr


def test_finished_run_is_not_repeated(run_file: Path, two_ranks: Path) -> None:
    before = (two_ranks / "summary.json").stat().st_mtime_ns
    done = one_process("trainer", str(run_file))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "already holds this finished run" in done.stdout
    assert (two_ranks / "summary.json").stat().st_mtime_ns == before


def test_adapter_loads_in_peft(two_ranks: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, DynamicCache

    from trainer.prompts.peft_adapter import load_peft

    model = yaml.safe_load((two_ranks / "run.yaml").read_text())["base"]["model"]
    plain = AutoModelForCausalLM.from_pretrained(ROOT / model, dtype=torch.float32)
    settings = json.loads((two_ranks / "prompts" / "soft" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == model
    assert Path(model).is_absolute()
    ids = torch.arange(5, 25)[None]
    saved = load_file(two_ranks / f"checkpoints/step-{STEPS:08d}/state.safetensors")
    for name in ("soft", "mlp"):
        folder = two_ranks / "prompts" / name
        virtual_PH = saved[f"{name}/best"]
        embedded = torch.cat([virtual_PH, plain.get_input_embeddings()(ids[0])])[None]
        with torch.no_grad():
            expected = plain(inputs_embeds=embedded).logits
            peft = PeftModel.from_pretrained(plain, folder)
            assert torch.allclose(peft(input_ids=ids).logits, expected, atol=1e-5)
        plain = peft.unload() if hasattr(peft, "unload") else peft.get_base_model()
    past = load_peft(two_ranks / "prompts" / "prefix").tensor
    assert torch.equal(past, saved["prefix/best"])
    cache = DynamicCache((past[:, i].permute(1, 2, 0, 3)[:, None]) for i in range(past.shape[1]))
    with torch.no_grad():
        expected = plain(input_ids=ids, past_key_values=cache).logits
        peft = PeftModel.from_pretrained(plain, two_ranks / "prompts" / "prefix")
        assert torch.allclose(peft(input_ids=ids).logits, expected, atol=1e-5)


@pytest.mark.parametrize("name", ["soft", "prefix"])
def test_generate(two_ranks: Path, tmp_path: Path, name: str) -> None:
    """On two ranks as on one; one of the two prompts from the command line."""
    arguments = [str(two_ranks), "--prompt", name, "--max-new-tokens", "8"]
    arguments += ["--input", "The patient has chest pain."]
    one = one_process("trainer.commands.generate", *arguments)
    answer = one.stdout.splitlines()[-1]
    if name == "soft":
        done = promptshard("generate", *arguments, "--processes", "2")
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout == answer + "\n", "stdout is the answer and nothing else"
    else:
        done = two_processes(tmp_path, "trainer.commands.generate", *arguments)
        assert done.returncode == 0, done.stdout
        assert answer in done.stdout.splitlines()


def test_cpu_offload_gives_equal_losses(run_file: Path, one_rank: Path) -> None:
    """On CPU, offloaded shards are in the same memory."""
    output = run_file.parent / "offload"
    policy = "engine.deepspeed=ds_configs/zero3_offload_cpu.json"
    done = one_process("trainer", str(run_file), f"output_dir={output}", policy)
    assert done.returncode == 0, done.stdout + done.stderr
    losses, expected = step_losses(output), step_losses(one_rank)
    assert len(losses) == 3 * STEPS  # three prompts
    assert [line[:2] for line in losses] == [line[:2] for line in expected]
    # Free memory decides how long packed batches are, and so in which order rows are summed.
    near = pytest.approx([loss for *_, loss in expected], rel=1e-5)
    assert [loss for *_, loss in losses] == near
    # One rank alone has its shard at hand, and nothing to fetch; an offloaded one has.
    assert summary(one_rank)["memory"]["kept_bytes_per_rank"] == 0
    assert summary(output)["memory"]["kept_bytes_per_rank"] > 0


def step_losses(output: Path) -> list[tuple[int, str, float]]:
    return [
        (line["step"], line["prompt"], line["metrics"]["train_loss"])
        for line in lines(output)
        if "train_loss" in line["metrics"]
    ]


#: Questions in the base's own words, which it answers without a prompt.
KNOWN = {
    "codegen": "Answer with a named Python function.\n",
    "animals": "What do lions and deer live on?\n",
}


def test_metrics_of_generated_texts(tmp_path: Path) -> None:
    """Execution and exact match, from data files to the summary."""
    run = yaml.safe_load((ROOT / "examples" / "codegen.yaml").read_text())
    animals = yaml.safe_load((ROOT / "examples" / "quickstart.yaml").read_text())["tasks"][1]
    del animals["choices"], animals["metric"]
    run["tasks"].append(animals | {"metric": "exact_match", "max_new_tokens": 4})
    for task in run["tasks"]:
        rows = (ROOT / task["validation"]).read_text().splitlines()[:20]
        task["validation"] = str(tmp_path / f"{task['name']}.jsonl")
        Path(task["validation"]).write_text("\n".join(rows) + "\n")
        del task["shifted_validation"]
        task["hand_written"] = [KNOWN[task["name"]]]
    run["prompts"] = [
        {"name": name, "task": name, "num_virtual_tokens": 10, "init": {"text": text}}
        for name, text in KNOWN.items()
    ]
    run |= {"output_dir": str(tmp_path / "run"), "training": {"steps": 1, "tokens_per_step": 256}}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    done = two_processes(tmp_path, "trainer", str(path))
    assert done.returncode == 0, done.stdout
    results = summary(tmp_path / "run")
    for name, metric in (("codegen", "execution"), ("animals", "exact_match")):
        key = f"validation_{metric}"
        base, (known,) = results["tasks"][name]["no_prompt"], results["tasks"][name]["hand_written"]
        assert base[key] < 0.2
        assert known[key] > 0.5
        score = results["prompts"][name][key]
        assert score == pytest.approx(round(score * 20) / 20), "a share of 20 rows"


def test_base_by_its_hub_id_without_a_network(run_file: Path, tmp_path: Path) -> None:
    """From huggingface_hub's cache; a model that is not cached is refused."""
    snapshot = fill_cache(tmp_path / "cache")
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "cache")}
    output = tmp_path / "run"
    words = ["train", str(run_file), f"output_dir={output}", "training.steps=1"]
    words += [f"tasks[0].validation={run_file.parent / 'few.jsonl'}", "tasks[0].hand_written=[]"]
    few = (run_file.parent / "validation.jsonl").read_text().splitlines()[:4]
    (run_file.parent / "few.jsonl").write_text("\n".join(few) + "\n")
    done = promptshard(*words, "base.model=org/tiny", "--processes", "1", **offline)
    assert done.returncode == 0, done.stdout + done.stderr
    config = json.loads((output / "prompts" / "soft" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/tiny"
    assert sorted(path.name for path in snapshot.iterdir()) == sorted(os.listdir(TINY))

    done = promptshard(*words, "base.model=org/gone", "--fresh", **offline)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "base.model: 'org/gone' is not a folder here" in done.stderr
    assert "hf download org/gone" in done.stderr
    assert done.stderr.count("org/gone") <= 4, "printed by one rank only"


def test_inspect_and_validation_scores_agree(two_ranks: Path, tmp_path: Path) -> None:
    """On all 40 rows the setting of the run gives its own losses, the other settings close ones."""
    saved = tmp_path / "run.json"
    done = two_processes(tmp_path, "trainer.commands.inspect", str(two_ranks), f"--json={saved}")
    assert done.returncode == 0, done.stdout
    inspection = json.loads(saved.read_text())
    names = ["none", "int8/dequantize", "int8/int8"]
    ways = [way for way in inspection["losses"]["settings"] if way["name"] in names]
    assert [way["left_out"] for way in ways] == [None] * 3

    trained = summary(two_ranks)
    (baseline,) = trained["tasks"].values()
    expected = {None: baseline["no_prompt"], **trained["prompts"]}
    expected |= {scores["text"]: scores for scores in baseline["hand_written"]}
    readers = {reader["name"]: reader for reader in inspection["losses"]["readers"]}
    assert readers.keys() == expected.keys()
    for name, reader in readers.items():
        assert reader["rows"] == 40
        plain, exact, fast = (reader["scores"][way] for way in names)
        assert exact["loss"] == pytest.approx(expected[name]["validation_loss"], abs=1e-5)
        assert exact["accuracy"] == expected[name]["validation_accuracy"]
        for other in (plain, fast):
            assert other["loss"] != exact["loss"]
            assert other["loss"] == pytest.approx(exact["loss"], rel=0.05)

    alone = tmp_path / "alone.json"
    model = yaml.safe_load((two_ranks / "run.yaml").read_text())["base"]["model"]
    done = command_line.promptshard("inspect", model, "--base", "--json", alone)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(alone.read_text())["weights"] == inspection["weights"]


def test_int8_matmul_reaches_the_loss_of_exact_matmul(run_file: Path, two_ranks: Path) -> None:
    output = run_file.parent / "int8"
    words = [str(run_file), f"output_dir={output}", "base.matmul=int8"]
    done = two_processes(run_file.parent, "trainer", *words)
    assert done.returncode == 0, done.stdout
    exact, fast = summary(two_ranks)["prompts"], summary(output)["prompts"]
    for name in ("soft", "mlp", "prefix"):
        loss = exact[name]["validation_loss"]
        assert fast[name]["validation_loss"] != loss
        assert fast[name]["validation_loss"] == pytest.approx(loss, rel=0.1)


@pytest.mark.fault("gradient is infinite or spikes")
def test_a_diverged_prompt_is_stopped_alone(run_file: Path, two_ranks: Path) -> None:
    """The run succeeds and names it; the other prompts are unchanged."""
    output = run_file.parent / "diverged"
    done = two_processes(
        run_file.parent,
        "trainer",
        str(run_file),
        f"output_dir={output}",
        "prompts.mlp.learning_rate=1e30",  # its encoder overflows
        "prompts.mlp.warmup_ratio=0",
        "training.max_skipped_updates=2",
    )
    assert done.returncode == 0, done.stdout
    assert "'mlp': 2 updates in a row were not finite" in done.stderr
    assert "lower its learning_rate" in done.stderr
    assert "diverged and stopped early: mlp" in done.stderr
    assert "mlp: diverged and was stopped at step" in (output / "report.html").read_text()
    results = summary(output)
    assert results["status"] == "finished"
    assert results["prompts"]["mlp"]["stopped"]["reason"] == "diverged"
    assert results["selected"]["triage"]["prompt"] in ("soft", "prefix")
    final = f"checkpoints/step-{STEPS:08d}/state.safetensors"
    before, after = load_file(two_ranks / final), load_file(output / final)
    for name in ("soft", "prefix"):
        assert results["prompts"][name]["stopped"] == {"step": STEPS, "reason": "finished"}
        assert torch.allclose(after[f"{name}/best"], before[f"{name}/best"], atol=1e-5)


def test_a_run_of_diverged_prompts_alone_fails(run_file: Path) -> None:
    output = run_file.parent / "all-diverged"
    run = yaml.safe_load(run_file.read_text())
    run["output_dir"] = str(output)
    run["prompts"] = [run["prompts"][1] | {"learning_rate": 1e30, "warmup_ratio": 0}]
    path = run_file.parent / "all-diverged.yaml"
    path.write_text(yaml.safe_dump(run))
    done = one_process("trainer", str(path), "training.max_skipped_updates=2")
    assert done.returncode == 1
    assert "2 updates in a row were not finite" in done.stderr
    assert "no prompt is left" in done.stderr
    assert summary(output)["status"] == "failed"


def test_early_stop(run_file: Path) -> None:
    """Prompts with a zero learning rate stop after the second validation."""
    output = run_file.parent / "early"
    done = one_process(
        "trainer",
        str(run_file),
        f"output_dir={output}",
        "prompts.soft.learning_rate=1e-30",
        "prompts.mlp.learning_rate=1e-30",
        "prompts.prefix.learning_rate=1e-30",
        "evaluation.every=2",
        "evaluation.early_stopping.patience=1",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 stopped early: soft (best at step 2), " in done.stdout
    results = summary(output)
    assert results["steps"] == 4
    assert {prompt["best_step"] for prompt in results["prompts"].values()} == {2}


def test_ctrl_c_ends_all_ranks_and_the_run_can_be_resumed(run_file: Path) -> None:
    """Only the command line of the user's own process shows a password."""
    output, secret = run_file.parent / "stopped", "hunter22"
    words = ["train", str(run_file), f"output_dir={output}", "checkpoint.every=1"]
    words.append(f"tracking.uri=sqlite:///{output}/m.db?password={secret}")
    process = subprocess.Popen(
        [sys.executable, "-m", "launch", *words, "training.steps=5000", "evaluation.every=5000"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # tests in the background ignore it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        deadline = time.monotonic() + 150
        while not list((output / "checkpoints").glob("step-*")):
            assert process.poll() is None, process.stdout and process.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        shown = [line for line in running("-o", "pid,args").splitlines() if secret in line]
        assert [int(line.split()[0]) for line in shown] == [process.pid]
        os.killpg(process.pid, signal.SIGINT)
        text, _ = process.communicate(timeout=60)
    finally:
        process.kill()  # the guard process ends its ranks
    assert process.returncode == 75, text
    assert "Stopped. Rerun the command to resume from step-" in text
    assert "error" not in text
    assert secret not in text
    for log in (output / "logs").glob("*.log"):
        assert secret not in log.read_text(), log
        assert log.stat().st_mode & 0o077 == 0, log
    deadline = time.monotonic() + 30  # the tracker's process may send on for a moment
    while str(output) in running():
        assert time.monotonic() < deadline, running()
        time.sleep(0.5)


def test_a_port_in_use_has_its_own_exit_code(run_file: Path) -> None:
    """``promptshard`` retries with another port. A single rank needs none."""
    with socket.create_server(("", 0)) as used:
        port = str(used.getsockname()[1])
        done = one_process(
            "trainer",
            str(run_file),
            "output_dir=" + str(run_file.parent / "taken"),
            MASTER_PORT=port,
            MASTER_ADDR="127.0.0.1",
            RANK="0",
            LOCAL_RANK="0",
            WORLD_SIZE="2",
        )
    assert done.returncode == EXIT_PORT_TAKEN
    assert f"port {port} is used by another process" in done.stderr


def running(*columns: str) -> str:
    """List processes: command lines and environments, or the given columns."""
    listing = ["ps", "-eww", *columns] if columns else ["ps", "axeww", "-o", "args"]
    return subprocess.run(listing, capture_output=True, text=True, check=True).stdout
