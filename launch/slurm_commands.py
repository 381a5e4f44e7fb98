"""The command ``promptshard submit``."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from launch import messages, plan_command, preflight, slurm
from launch import submit as submission
from launch.arguments import Fresh, Overrides, RunFile, Verbose, option
from launch.slurm import Job
from launch.slurm_queue import last_job
from trainer.config import PROJECT_ROOT, RunConfig
from trainer.runtime.errors import BadInput
from trainer.runtime.redact import redact


def submit(
    run_file: RunFile,
    nodes: Annotated[int, option("N", "Number of nodes.")],
    overrides: Overrides = None,
    gpus_per_node: Annotated[int | None, option("G", "GPUs (= ranks) per node.")] = None,
    processes_per_node: Annotated[int, option("N", "Ranks per node without GPUs.")] = 1,
    time: Annotated[
        str | None, option("T", "Time limit: minutes, HH:MM:SS or DAYS-HH:MM:SS.")
    ] = None,
    partition: Annotated[str | None, option("P")] = None,
    account: Annotated[str | None, option("A")] = None,
    qos: Annotated[str | None, option("Q")] = None,
    mem: Annotated[str | None, option("M", "Memory per node: 64G; 0: all.")] = None,
    cpus_per_task: Annotated[
        int | None,
        option("N", "CPU cores per node, for all its ranks. [default: Slurm's, often 1]"),
    ] = None,
    job_name: Annotated[str | None, option("NAME", "[default: the output folder's name]")] = None,
    dependency: Annotated[str | None, option("D", "Wait for another job: afterok:JOB_ID.")] = None,
    array: Annotated[
        list[str] | None,
        option(
            "KEY=[V, V]", "Job array with one task per value; given twice, one per combination."
        ),
    ] = None,
    at_once: Annotated[
        int | None, option("N", "Maximum number of array tasks running at once.")
    ] = None,
    signal_seconds: Annotated[
        int, option("S", "Seconds before the time limit at which to save and stop.")
    ] = 120,
    max_requeues: Annotated[
        int, option("N", "Maximum number of automatic requeues (0: never).")
    ] = 20,
    module: Annotated[
        list[str] | None, option("NAME", "Environment module; may be repeated.")
    ] = None,
    container_image: Annotated[str | None, option("IMAGE", "Run in a container (pyxis).")] = None,
    container_mounts: Annotated[
        list[str] | None, option("SRC:DST", "Additional mount; may be repeated.")
    ] = None,
    python: Annotated[
        str | None, option("PATH", "[default: this one; in a container python3]")
    ] = None,
    sbatch: Annotated[
        list[str] | None, option("OPTION", "Any other option: --sbatch=--constraint=h100.")
    ] = None,
    plan: Annotated[
        bool,
        typer.Option(
            "--plan",
            help="Plan the run first, for --gpu or this machine's CPU: refuse a job that cannot "
            "fit, and ask for the planned time if --time is not given.",
        ),
    ] = False,
    gpu: plan_command.Gpu = None,
    network: plan_command.Network = "ndr",
    hardware: plan_command.HardwareFile = None,
    fresh: Fresh = False,
    verbose: Verbose = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the sbatch script without submitting it.")
    ] = False,
) -> None:
    """Submit a run to Slurm (one task per node) and requeue it at each time limit.

    Checks the run file and all data first. The job runs a copy of the run file and of the code,
    kept in `output_dir/logs/submitted`, also when it is requeued later. Before its time limit the
    job saves, stops and requeues itself. `output_dir` must be in a folder that all nodes share.
    Needs Slurm 22.05 or newer.

    **Examples:**

    - `promptshard submit run.yaml --nodes 4 --gpus-per-node 8 --time 12:00:00`
    - `promptshard submit run.yaml --nodes 1 --gpus-per-node 8 --array "training.seed=[0, 1, 2]"`
    - `promptshard submit run.yaml --nodes 2 --gpus-per-node 8 --plan --gpu h100-80gb`
    - `promptshard submit run.yaml --nodes 2 --dry-run > job.sbatch`
    """
    overrides = overrides or []
    if not plan and (gpu is not None or hardware is not None):
        raise BadInput("--gpu, --hardware: describe the GPU of a plan; add --plan")
    job = Job(
        name=job_name or "promptshard",
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        processes_per_node=processes_per_node,
        time=time,
        partition=partition,
        account=account,
        qos=qos,
        mem=mem,
        cpus_per_task=cpus_per_task,
        dependency=dependency,
        extra=tuple(sbatch or ()),
        tasks=((run_file, *overrides),),
        at_once=at_once,
        code=str(PROJECT_ROOT),
        python=python or ("python3" if container_image else sys.executable),
        chdir=os.getcwd(),
        signal_seconds=signal_seconds,
        max_requeues=max_requeues,
        modules=tuple(module or ()),
        container=container_image,
        mounts=tuple(container_mounts or ()),
        fresh=fresh,
        verbose=verbose,
        command=redact(shlex.join(["promptshard", *sys.argv[1:]])),
    )
    if problems := list(slurm.problems(job)):
        raise BadInput(problems)
    if not dry_run:
        submission.check_slurm()
    output_dir, tasks, configs = _checked(run_file, overrides, array or [])
    if plan:
        ranks = gpus_per_node or processes_per_node
        limits = [
            plan_command.time_limit(
                plan_command.plan_arguments(
                    task[0],
                    task[1:],
                    nodes * ranks,
                    ranks,
                    gpu=gpu,
                    network=network,
                    hardware=hardware,
                    cpu=gpus_per_node is None,
                )
            )
            for task in tasks
        ]
        longest = max(limits, key=lambda limit: limit.hours)
        messages.note(
            f"planned: {longest.hours:.3g} h"
            + (f"; --time {longest.time}" if time is None else f" of --time {time}")
        )
        job = replace(job, time=time or longest.time)
    folder = Path(output_dir).absolute()
    job = replace(
        job,
        name=job_name or folder.name,
        tasks=tuple(tasks),
        mounts=(*job.mounts, f"{folder}:{folder}") if container_image else job.mounts,
        log="slurm-%A_%a.out" if len(tasks) > 1 else "slurm-%j.out",
    )
    if problems := list(slurm.problems(job)):  # again, now with the run file's names
        raise BadInput(problems)
    if dry_run:
        _refuse_passwords(tasks)
        typer.echo(slurm.render(job), nl=False)
        messages.note(
            "not submitted (--dry-run); a submitted job runs a copy of the run file and the code "
            f"in {Path(output_dir) / submission.SUBMITTED}"
        )
        return
    last = last_job(Path(output_dir))
    if last is not None and last.active and dependency is None:
        raise BadInput(
            f"output_dir: job {last.id} for {output_dir} is {last.state.lower()}; scancel it, "
            f"give another output_dir, or wait for it: --dependency afterany:{last.id}"
        )
    job, frozen = submission.freeze(job, configs, output_dir)
    number, cluster = submission.submit(job, frozen, configs)
    kind = f"job array {number} of {len(configs)} tasks" if len(configs) > 1 else f"job {number}"
    typer.echo(f"submitted {kind}: {frozen / 'job.sbatch'}")
    log = job.log.replace("%%", "%").replace("%j", number).replace("%A", number)
    typer.echo(f"log:      {log}")
    typer.echo(f"status:   promptshard status {shlex.quote(output_dir)}")
    where = f"--clusters={cluster} " if cluster else ""
    again = slurm.submit_again(fresh=fresh)
    typer.echo(f"stop:     scancel {where}{number}   (saves first; {again})")


def _checked(
    run_file: str, overrides: Sequence[str], array: Sequence[str]
) -> tuple[str, list[tuple[str, ...]], list[RunConfig]]:
    """Check every task's run file; return the output folder, and arguments and config by task."""
    printed: set[str] = set()
    config = preflight.check_run(run_file, overrides, printed)
    if not array:
        return config.output_dir, [(run_file, *overrides)], [config]
    own = submission.array_tasks(array, config.output_dir)
    tasks = [(run_file, *overrides, *settings) for settings in own]
    configs = [preflight.check_run(run_file, task[1:], printed) for task in tasks]
    if len(configs) == 1:  # a job, not an array
        return configs[0].output_dir, tasks, configs
    return config.output_dir, tasks, configs


def _refuse_passwords(tasks: Sequence[tuple[str, ...]]) -> None:
    words = dict.fromkeys(word for task in tasks for word in task if redact(word) != word)
    if words:
        raise BadInput(
            f"override {redact(word)!r}: the script would show the password; write it into the run "
            "file, or submit without --dry-run, which keeps it in a file that only you can read"
            for word in words
        )
