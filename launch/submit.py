"""Submit a run to Slurm: copy run file and code, write the script, call sbatch.

The copies are kept with the logs, so that a job that is requeued days later runs the same code:

    OUTPUT_DIR/logs/submitted/20260131-235959/run.yaml      resolved; run-0.yaml ... of an array
                                              code/         trainer, launch, ds_configs, REVISION
                                              policy.json   DeepSpeed settings
                                              job.sbatch
                                              job.json      job id, command, tasks; read by `status`
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Container, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from launch import preflight, slurm
from launch.slurm import Job
from trainer.config import (
    PROJECT_ROOT,
    SHIPPED,
    RunConfig,
    dump,
    resolve_path,
    yaml_parser,
    yaml_source,
)
from trainer.config.yaml_parser import YamlError
from trainer.runtime import atomic_io
from trainer.runtime.errors import BadInput
from trainer.runtime.git_revision import REVISION_FILE, git_revision
from trainer.runtime.redact import redact

SUBMITTED = Path("logs", "submitted")
RECORD = "job.json"
PACKAGES = ("trainer", "launch")
OLDEST = (22, 5)
SBATCH_SECONDS = 120
MAX_TASKS = 1000  # of a job array; slurm.conf's MaxArraySize is 1001 by default
#: Environment variables of a Slurm job that runs ``submit``; the new job must not inherit them.
FOREIGN = re.compile(
    r"(SLURM_(?!CONF$|CONF_SERVER$|CLUSTERS$)|PMI|PMIX_|RANK$|LOCAL_RANK$|WORLD_SIZE$)"
)
#: Options of sbatch whose environment variable SBATCH_NAME has another name.
VARIABLES = {"array": "ARRAY_INX", "mem": "MEM_PER_NODE", "time": "TIMELIMIT"}


def check_slurm() -> None:
    """Check that sbatch is installed and recent enough for the script."""
    if shutil.which("sbatch") is None:
        raise BadInput(
            "submit: sbatch is not on PATH; run this on a login node of a Slurm cluster, or use "
            "--dry-run to print the script"
        )
    done = _run(["sbatch", "--version"])
    version = re.search(r"(\d+)\.(\d+)", done.stdout)
    if version is not None and (int(version[1]), int(version[2])) < OLDEST:
        raise BadInput(f"submit: {done.stdout.strip()} is too old; Slurm 22.05 or newer is needed")


def array_tasks(lists: Sequence[str], output_dir: str) -> list[tuple[str, ...]]:
    """Return the overrides of every task of a job array: all combinations of ``KEY=[VALUES]``.

    Each task has its own output folder, named after its values.

    Raises:
        BadInput: lists are invalid; names all.
    """
    problems: list[str] = []
    settings: list[list[tuple[str, str]]] = []
    for text in lists:
        key, equals, written = text.partition("=")
        try:
            values = yaml_source.value_of(key, written)
        except YamlError as error:
            problems += [f"--array: {text!r}: {problem}" for _, _, problem in error.problems]
            continue
        if not equals or not isinstance(values, list) or len(values) < 1:
            problems.append(f"--array: {text!r} must be a list; write KEY=[VALUE, VALUE]")
        elif duplicate := _duplicate(values):
            problems.append(f"--array: {key.strip()}: has {duplicate} more than once; remove one")
        elif key.strip() == "output_dir":
            problems.append(
                "--array: output_dir: every task already has its own, inside output_dir"
            )
        else:
            settings.append([(key.strip(), _inline(value)) for value in values])
    combinations = list(itertools.product(*settings))
    if len(combinations) > MAX_TASKS:
        problems.append(f"--array: {len(combinations)} tasks; at most {MAX_TASKS} fit one job")
    if problems:
        raise BadInput(problems)
    names = ["-".join(_word(*pair) for pair in chosen) for chosen in combinations]
    if len(set(names)) < len(names):
        names = [f"{i}-{name}" for i, name in enumerate(names)]
    return [
        (*(f"{key}={value}" for key, value in chosen), f"output_dir={_inline(f'{output_dir}/{n}')}")
        for chosen, n in zip(combinations, names, strict=True)
    ]


def freeze(job: Job, configs: Sequence[RunConfig], output_dir: str) -> tuple[Job, Path]:
    """Copy run file and code into a new folder; return the job that runs them, and the folder.

    Raises:
        BadInput: the folder cannot be written.
    """
    stamp = time.strftime("%Y%m%d-%H%M%S")
    parent = Path(output_dir).absolute() / SUBMITTED
    with preflight.writing(output_dir):
        parent.mkdir(parents=True, exist_ok=True)
        folder = _new_folder(parent, stamp)
        code = folder / "code"
        for name in PACKAGES:
            ignored = shutil.ignore_patterns("__pycache__", "shipped")
            shutil.copytree(PROJECT_ROOT / name, code / name, ignore=ignored)
        shutil.copytree(SHIPPED / "ds_configs", code / "ds_configs")
        if (SHIPPED / "examples").is_dir():  # run files may name files in it
            (code / "examples").symlink_to(SHIPPED / "examples")
        (code / REVISION_FILE).write_text(f"{git_revision(PROJECT_ROOT) or ''}\n")
        shutil.copy(resolve_path(configs[0].engine.deepspeed), folder / "policy.json")
        runs = [folder / "run.yaml"]
        if len(configs) > 1:
            runs = [folder / f"run-{i}.yaml" for i in range(len(configs))]
        for config, path in zip(configs, runs, strict=True):
            path.touch(mode=0o600)  # tracking.uri may hold a password
            engine = config.engine.model_copy(update={"deepspeed": str(folder / "policy.json")})
            frozen = config.model_copy(update={"engine": engine})
            path.write_text(dump(frozen), encoding="utf-8")
    log = slurm.pattern(str(parent.parent / "slurm-"))
    job = replace(
        job,
        tasks=tuple((str(path),) for path in runs),
        code=str(code),
        chdir=os.getcwd(),
        log=log + ("%A_%a.out" if len(runs) > 1 else "%j.out"),
    )
    return job, folder


def submit(job: Job, folder: Path, configs: Sequence[RunConfig]) -> tuple[str, str]:
    """Write script and record, and submit the script; return the job id and cluster.

    The cluster is empty unless sbatch names it, as it does for ``--clusters``.

    Raises:
        BadInput: sbatch refuses the job; the folder is removed.
    """
    script, text = folder / "job.sbatch", slurm.render(job)
    atomic_io.write(script, text)
    done = _run(["sbatch", "--parsable", str(script)], without=_overriding(text))
    number, _, cluster = done.stdout.strip().split("\n")[-1].partition(";")
    if done.returncode != 0 or not number.isdigit():
        shutil.rmtree(folder)
        answer = " ".join((done.stderr or done.stdout).split()) or f"exit code {done.returncode}"
        raise BadInput(f"submit: sbatch refused the job: {answer}")
    record = {
        "job": number,
        "cluster": cluster,
        "submitted": time.time(),
        "command": job.command,
        "tasks": [str(Path(config.output_dir).absolute()) for config in configs],
    }
    atomic_io.write_json(folder / RECORD, record)
    return number, cluster


def _overriding(script: str) -> set[str]:
    """Return the environment variables that sbatch would prefer to the options in a script."""
    options = re.findall(r"^#SBATCH --([a-z-]+)", script, flags=re.MULTILINE)
    names = {VARIABLES.get(option, option.upper().replace("-", "_")) for option in options}
    return {f"SBATCH_{name}" for name in names | {"REQUEUE", "NO_REQUEUE"}}


def _run(command: Sequence[str], without: Container[str] = ()) -> subprocess.CompletedProcess[str]:
    kept = (name for name in os.environ if not FOREIGN.match(name) and name not in without)
    try:
        return subprocess.run(
            command,
            env={name: os.environ[name] for name in kept},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SBATCH_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise BadInput(f"submit: {command[0]} did not answer within {SBATCH_SECONDS} s") from None


def _new_folder(parent: Path, stamp: str) -> Path:
    for number in itertools.count(1):
        folder = parent / (stamp if number == 1 else f"{stamp}-{number}")
        with suppress(FileExistsError):
            folder.mkdir()
            return folder
    raise AssertionError


def _duplicate(values: Sequence[Any]) -> str | None:
    """Return a duplicate value, if any; 1 and 1.0 are equal, 1 and true are not."""
    seen: set[str] = set()
    for value in values:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        key = json.dumps(float(value) if number else value, sort_keys=True)
        if key in seen:
            return _inline(value)
        seen.add(key)
    return None


def _inline(value: Any) -> str:
    """Format a value as one line of YAML, as in an override."""
    return yaml_parser.dump(value, one_line=True)


def _word(key: str, value: str) -> str:
    last = re.split(r"[.\[\]]+", key.rstrip("]"))[-1]
    text = re.sub(r"[^A-Za-z0-9._+-]+", "-", redact(value)).strip("-.") or "empty"
    return f"{last}-{text}"[:80]
