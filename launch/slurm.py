"""Check the settings of a Slurm job, and render its sbatch script. Pure functions.

A job has one task per node: ``srun`` starts ``launch/node.py``, which starts the node's ranks.
Before the time limit Slurm signals the batch shell, which forwards the signal to the ranks and
requeues the job after they have saved and stopped. Needs Slurm 22.05 or newer.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from trainer.runtime.errors import EXIT_BAD_INPUT, EXIT_RESUMABLE
from trainer.runtime.redact import printable

#: srun --wait: time for the other nodes after one has ended. After a success they end together
#: (``Ranks.wait_for_main``); after a failure the others may still save.
WAIT_SECONDS = 300
#: The signal is repeated, because a task that is still starting ignores it.
REPEAT_SECONDS = 10
#: Rendezvous ports, below Linux's ephemeral range. Each restart uses another port: a rank on a lost
#: node may still hold the previous one.
FIRST_PORT, PORTS, RESTART_STRIDE = 10000, 20000, 1009
MAX_SIGNAL_SECONDS = 65535  # sbatch(1)

_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")
_NAMES = r"[\w.+-]+"
_JOBS = r"\d+(?:_(?:\d+|\*))?(?:\+\d+)?"
_AFTER = rf"(?:singleton|after(?:any|ok|notok|corr|burstbuffer)?(?::{_JOBS})+)"
#: sbatch options that promptshard sets itself; --sbatch may not override them.
OWN_OPTIONS = (
    *("job-name", "nodes", "ntasks", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "mem"),
    *("time", "partition", "account", "qos", "dependency", "array", "chdir", "output", "error"),
    *("open-mode", "signal", "requeue", "no-requeue", "wrap", "test-only", "parsable"),
)


@dataclass(frozen=True, kw_only=True)
class Job:
    """A job. Paths are valid on its nodes; resources are named as in sbatch(1).

    Attributes:
        gpus_per_node: also the number of ranks per node; None to run on CPUs.
        processes_per_node: ranks per node without GPUs.
        extra: further sbatch options, such as ``--constraint=h100``.
        tasks: ``(RUN.yaml, key=value, ...)`` of each task; several tasks form a job array.
        python: interpreter with the installed libraries.
        chdir: working directory of the job; None: the directory where sbatch is called.
        log: path pattern of the log, with sbatch's ``%j``.
        signal_seconds: time before the time limit at which ranks are signalled to save and stop.
        container, mounts: image for pyxis, and ``SOURCE:TARGET`` of each mount.
        command: the command that made the script, written as a comment.
    """

    name: str
    nodes: int
    gpus_per_node: int | None = None
    processes_per_node: int = 1
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    mem: str | None = None
    cpus_per_task: int | None = None
    dependency: str | None = None
    extra: tuple[str, ...] = ()
    tasks: tuple[tuple[str, ...], ...]
    at_once: int | None = None
    code: str = "."
    python: str = ".venv/bin/python"
    chdir: str | None = None
    log: str = "slurm-%j.out"
    signal_seconds: int = 120
    max_requeues: int = 20
    modules: tuple[str, ...] = ()
    container: str | None = None
    mounts: tuple[str, ...] = ()
    fresh: bool = False
    verbose: bool = False
    command: str = ""


def problems(job: Job) -> Iterator[str]:
    """Yield problems of a job's options that Slurm would refuse or misread."""
    for option, number in (
        ("--nodes", job.nodes),
        ("--gpus-per-node", job.gpus_per_node),
        ("--processes-per-node", job.processes_per_node),
        ("--cpus-per-task", job.cpus_per_task),
        ("--at-once", job.at_once),
    ):
        if number is not None and number < 1:
            yield f"{option}: {number} is too few; give 1 or more"
    if job.gpus_per_node is not None and job.processes_per_node != 1:
        yield "--processes-per-node: is for nodes without GPUs; remove it, or --gpus-per-node"
    for option, value, pattern, remedy in (
        ("--partition", job.partition, rf"{_NAMES}(,{_NAMES})*", "give a name of `sinfo`"),
        ("--account", job.account, r"[\w.@+-]+", "give a name without spaces"),
        ("--qos", job.qos, _NAMES, "give a name without spaces"),
        ("--mem", job.mem, r"\d+[KMGT]?", "give megabytes, or as 64G; 0 is all of a node"),
        ("--dependency", job.dependency, rf"{_AFTER}([,?]{_AFTER})*", "write afterok:JOB_ID"),
    ):
        if value is not None and not re.fullmatch(pattern, value, flags=re.ASCII):
            yield f"{option}: {value!r} is not valid; {remedy}"
    for module in job.modules:
        if not re.fullmatch(r"[\w./+=@-]+", module):
            yield f"--module: {module!r} is not valid; give a name of `module avail`"
    for mount in job.mounts:
        if mount.count(":") not in (1, 2) or "," in mount:
            yield f"--container-mounts: {mount!r} is not valid; write SOURCE:TARGET, absolute paths"
    if job.mounts and job.container is None:
        yield "--container-mounts: needs --container-image"
    for option in job.extra:
        yield from _extra_problems(option)
    yield from _time_problems(job)
    if job.max_requeues < 0:
        yield f"--max-requeues: {job.max_requeues} is too few; give 0 for none"
    texts = [job.name, job.code, job.python, job.log, job.container or "", job.chdir or ""]
    texts += [*job.mounts, *job.extra, *(word for task in job.tasks for word in task)]
    for text in texts:
        if has_controls(text):
            yield f"{text!r}: has a line break or control character; rename it, or write another"


def has_controls(text: str) -> bool:
    """Whether a text has line breaks or control characters, which could change a script."""
    return "\n" in text or "\t" in text or printable(text) != text


def _extra_problems(option: str) -> Iterator[str]:
    match = re.fullmatch(r"--([a-z][a-z-]*)(=.*)?", option)
    if match is None:
        yield f"--sbatch: {option!r} is not an option; write the whole option, as --constraint=h100"
    elif match[1] in OWN_OPTIONS:
        ours = f"use promptshard's own --{match[1]}, if it has one"
        yield f"--sbatch: --{match[1]} is set by the job itself; {ours}"


def _time_problems(job: Job) -> Iterator[str]:
    time, ahead = job.time, job.signal_seconds
    if not 0 < ahead <= MAX_SIGNAL_SECONDS:
        yield f"--signal-seconds: {ahead} is not within 1 to {MAX_SIGNAL_SECONDS}"
    if time is None:
        return
    seconds = time_seconds(time)
    if not seconds:
        yield f"--time: {time!r} is not a valid time; write minutes, HH:MM:SS, or DAYS-HH:MM:SS"
    elif ahead >= seconds:
        yield (
            f"--signal-seconds: {ahead} is not before the time limit ({time}: {seconds} s); give "
            "fewer seconds, or a longer --time"
        )


def time_seconds(text: str) -> int | None:
    """Return the seconds of a time limit of sbatch(1); None if it is not valid.

    Formats: ``M``, ``M:S``, ``H:M:S``, ``D-H``, ``D-H:M`` or ``D-H:M:S``.
    """
    match = _TIME.fullmatch(text)
    if match is None:
        return None
    days, *rest = match.groups()
    parts = [int(part) for part in rest if part is not None]
    if days is None and len(parts) < 3:
        parts.insert(0, 0)  # minutes come first
    hours, minutes, seconds = [*parts, 0, 0][:3]
    if (minutes > 59 and hours) or seconds > 59:
        return None
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def render(job: Job) -> str:
    """Render the sbatch script of a job; ``problems`` must be empty."""
    command = printable(" ".join(job.command.split()))  # a comment is one line
    head = ["#!/bin/bash", *([f"# {command}"] if command else []), *_options(job)]
    return "\n".join([*head, "", "set -uo pipefail", *_setup(job), *_shell(job)]) + "\n"


def _options(job: Job) -> Iterator[str]:
    options = {
        "job-name": job.name,
        "nodes": job.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": job.gpus_per_node,
        "cpus-per-task": job.cpus_per_task,
        "mem": job.mem,
        "time": job.time,
        "partition": job.partition,
        "account": job.account,
        "qos": job.qos,
        "dependency": job.dependency,
    }
    if len(job.tasks) > 1:
        limit = f"%{job.at_once}" if job.at_once else ""
        options["array"] = f"0-{len(job.tasks) - 1}{limit}"
    options |= {"chdir": job.chdir, "output": job.log, "open-mode": "append"}
    options["signal"] = f"B:USR1@{job.signal_seconds}"
    for option, value in options.items():
        if value is not None:
            yield f"#SBATCH --{option}={directive(str(value))}"
    yield f"#SBATCH --{'requeue' if job.max_requeues else 'no-requeue'}"
    for option in job.extra:
        name, equals, value = option.partition("=")
        yield f"#SBATCH {name}{equals}{directive(value) if equals else ''}"


def directive(value: str) -> str:
    """Quote a value for a ``#SBATCH`` line, where sbatch interprets quotes and backslashes.

    Raises:
        ValueError: the value has a line break, which would start another line of the script.
    """
    if has_controls(value):
        raise ValueError(f"not a value for a line of a script: {value!r}")
    if re.fullmatch(r"[\w@%+:,./=-]*", value, flags=re.ASCII) and value:
        return value
    return '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'


def pattern(path: str) -> str:
    """Escape a path for sbatch's --output, where ``%`` starts a placeholder."""
    return path.replace("%", "%%")


def _setup(job: Job) -> Iterator[str]:
    yield 'log() { printf \'%(%F %T)T job %s: %s\\n\' -1 "$SLURM_JOB_ID" "$*"; }'
    yield ""
    if job.modules:
        yield "set +u  # profiles and modules (such as those of conda) read unset variables"
        yield "if ! type module >/dev/null 2>&1; then source /etc/profile; fi"
        yield from (f"module load {module} || exit 1" for module in job.modules)
        yield "set -u"
    if len(job.tasks) == 1:
        yield f"set -- {shlex.join(job.tasks[0])}"
    else:
        yield "case $SLURM_ARRAY_TASK_ID in"
        yield from (f"    {i}) set -- {shlex.join(task)} ;;" for i, task in enumerate(job.tasks))
        yield "esac"
    if job.verbose:
        yield 'set -- --verbose "$@"'
    yield "restarts=${SLURM_RESTART_COUNT:-0}"
    if job.fresh:
        yield 'set -- --fresh "$@"'  # after a requeue, nothing is archived again
    yield f"""
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
if [ "${{#hosts[@]}}" -ne "$SLURM_JOB_NUM_NODES" ]; then
    log "scontrol names ${{#hosts[@]}} hosts, but the job has $SLURM_JOB_NUM_NODES nodes" >&2
    exit {EXIT_BAD_INPUT}
fi
port=$(({FIRST_PORT} + (SLURM_JOB_ID + {RESTART_STRIDE} * restarts) % {PORTS}))
log "on ${{#hosts[@]}} nodes (${{hosts[*]}}), restart $restarts, port $port\""""


def _srun(job: Job) -> Iterator[str]:
    """Yield the lines of the srun command. Each node has one task, with rank SLURM_NODEID."""
    # if one node fails, the others have time to save
    yield f"srun --nodes={job.nodes} --ntasks-per-node=1 --kill-on-bad-exit=0"
    # the environment of this script, which sbatch --export=NONE would also withhold from tasks
    yield f"--wait={WAIT_SECONDS} --export=ALL"
    if job.cpus_per_task is not None:
        yield f"--cpus-per-task={job.cpus_per_task}"  # not inherited from sbatch since 22.05
    if job.container is not None:
        yield shlex.quote(f"--container-image={job.container}")
        mounts = [*job.mounts]
        for folder in (job.chdir, job.code):
            if folder is not None and folder.startswith("/"):
                mounts.append(f"{folder}:{folder}")
        if mounts:
            yield shlex.quote(f"--container-mounts={','.join(mounts)}")
        if job.chdir is not None:
            yield shlex.quote(f"--container-workdir={job.chdir}")
    # signals are ignored until Python has handlers; the batch shell repeats them
    yield """bash -c 'trap "" USR1 TERM; exec "$@" --node-rank "$SLURM_NODEID"' -"""
    # by path, because -m would import from the working directory first
    bootstrap = f"{job.code}/trainer/runtime/bootstrap.py"
    yield f"{shlex.quote(job.python)} {shlex.quote(bootstrap)} launch.node"
    if job.gpus_per_node is not None:
        yield "--need-gpus"
    slots = job.gpus_per_node or job.processes_per_node
    yield f'--hosts "$(IFS=,; echo "${{hosts[*]}}")" --slots {slots}'
    yield '--master-addr "${hosts[0]}" --master-port "$port" "$@" &'


def submit_again(*, fresh: bool) -> str:
    """Return what resumes a stopped job; with ``--fresh`` it would start over."""
    return f"submit it again{' without --fresh' if fresh else ''} to resume"


def _shell(job: Job) -> Iterator[str]:
    again = submit_again(fresh=job.fresh)
    yield f"""
step= notified= time_limit_near= cancelled=
notify() {{
    if [ -n "$step" ] && [ -z "$notified" ]; then
        notified=yes
        log "$1: signalling the ranks to save and stop"
        for ((second = 0; ; second++)); do
            kill -0 "$step" 2>/dev/null || break
            ((second % {REPEAT_SECONDS})) || kill -USR1 "$step"
            sleep 1
        done &
    fi
}}
trap 'time_limit_near=yes; notify "the time limit is near"' USR1
trap 'cancelled=yes; notify "cancelled or preempted"' TERM
"""
    yield " \\\n    ".join(_srun(job))
    yield f"""step=$!
[ -z "$time_limit_near" ] || notify "the time limit is near"
wait "$step"
while kill -0 "$step" 2>/dev/null; do wait "$step"; done
wait "$step"
code=$?
wait  # for notify's loop: a job leaves no process

job=$SLURM_JOB_ID
[ -z "${{SLURM_ARRAY_JOB_ID:-}}" ] || job=${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID
if [ "$code" -ne {EXIT_RESUMABLE} ]; then
    log "ended with exit code $code"
elif [ -n "$cancelled" ]; then
    log "stopped and saved; {again}, unless Slurm requeues it"
elif [ "$restarts" -ge {job.max_requeues} ]; then
    log "stopped and saved, requeued {job.max_requeues} times already; {again}"
else
    log "stopped and saved; requeued as restart $((restarts + 1)) of at most {job.max_requeues}"
    scontrol requeue "$job" || log "could not be requeued; {again}" >&2
fi
exit "$code\""""
