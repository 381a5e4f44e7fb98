"""The commands of ``promptshard``. They import no torch, so that ``--help`` is instant."""

from __future__ import annotations

import enum
import itertools
import os
import shlex
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from launch import (
    __version__,
    chat_command,
    completion,
    evaluate_command,
    example_commands,
    export_command,
    generate_command,
    inspect_command,
    lint_command,
    messages,
    node,
    plan_command,
    predict_command,
    preflight,
    push_command,
    restarts,
    scaffold_commands,
    serve_command,
    settings_commands,
    slurm_commands,
    status_commands,
)
from launch.arguments import (
    EXIT_CODES,
    Fresh,
    NewFolder,
    Overrides,
    Processes,
    RunDir,
    RunFile,
    Verbose,
    as_path,
    option,
    path_argument,
)
from launch.exit_report import ExitReport
from launch.launcher_command import is_local, read_hostfile
from launch.run_state import LAUNCHER_MARKS
from launch.start import count, run_alone, start_ranks
from trainer.checkpointing.run_lock import LOCK, refuse_if_alive
from trainer.config import load
from trainer.runtime.errors import BadInput
from trainer.runtime.process import ROWS_CHECKED, START_OPTIONS, STARTED, process_age
from trainer.tracking.process_client import URI_VARIABLE

app = typer.Typer(
    help="Train soft prompts for frozen language models that are too big for one GPU.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Storage(enum.StrEnum):
    """Values of base.embeddings and base.head in the run file."""

    KEEP = "keep"
    INT8 = "int8"


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"promptshard {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


def train(
    run_file: RunFile,
    overrides: Overrides = None,
    processes: Processes = None,
    hostfile: Annotated[
        str | None,
        option(
            "FILE",
            "Several machines, reached with ssh and pdsh: one `HOST slots=GPUS` per line.",
            callback=as_path,
        ),
    ] = None,
    no_ssh: Annotated[
        bool,
        typer.Option(
            "--no-ssh", help="Start only this host's ranks; run the same command on every host."
        ),
    ] = False,
    node_rank: Annotated[
        int | None, option("N", "With --no-ssh: index of this host in the hostfile, from 0.")
    ] = None,
    master_addr: Annotated[
        str | None, option("A", "With --no-ssh: rendezvous address. [default: the first host]")
    ] = None,
    master_port: Annotated[
        int | None, option("P", f"With --no-ssh: rendezvous port. [default: {node.DEFAULT_PORT}]")
    ] = None,
    fresh: Fresh = False,
    max_restarts: Annotated[
        int,
        option(
            "N",
            "Restart from the last checkpoint after a failure, at most N times (single machine "
            "only).",
            min=0,
        ),
    ] = 0,
    verbose: Verbose = False,
) -> None:
    """Train the prompts defined in a run file on one sharded base model.

    Checks the run file and all data first. Then it starts one process per GPU, as the DeepSpeed
    launcher does, which can also be called by hand: `deepspeed --module trainer RUN.yaml`, but not
    in a folder with Python files of your own, which would be imported first. Ctrl-C saves a
    checkpoint and stops all processes. Per-process logs are in `output_dir/logs`.

    **Examples:**

    - `promptshard train quickstart.yaml` (of `promptshard examples`)
    - `promptshard train run.yaml training.steps=50 output_dir=runs/short --processes 1`
    - `promptshard train run.yaml --max-restarts 3`
    - `promptshard train run.yaml --hostfile hosts`
    - `promptshard train run.yaml --hostfile hosts --no-ssh --node-rank 1` (on the second host)
    """
    overrides = overrides or []
    place = None
    if no_ssh:
        if hostfile is None:
            raise BadInput("--no-ssh: list all hosts in a --hostfile, the same file on every host")
        if processes is not None:
            raise BadInput("--processes: not with --no-ssh; set HOST slots=NUMBER in the hostfile")
        place = node.place_of(hostfile, node_rank, master_addr, master_port)
    elif (node_rank, master_addr, master_port) != (None, None, None):
        raise BadInput("--node-rank, --master-addr and --master-port need --no-ssh; add it")
    if max_restarts and hostfile and not is_local(read_hostfile(hostfile)):
        raise BadInput(
            f"--max-restarts: works on a single machine only, but {hostfile} names others; on "
            "Slurm, a job of promptshard submit is requeued when it loses a node"
        )
    config = preflight.check_run(run_file, overrides)
    os.environ[ROWS_CHECKED] = "1"
    os.environ[START_OPTIONS] = _start_options(
        {
            "--processes": processes,
            "--hostfile": hostfile,
            "--no-ssh": no_ssh,
            "--node-rank": node_rank,
            "--master-addr": master_addr,
            "--master-port": master_port,
            "--max-restarts": max_restarts or None,
        }
    )
    # Its ranks take the lock only when they have imported their libraries.
    starting = () if node_rank else [f"logs/{name}" for name in LAUNCHER_MARKS]
    refuse_if_alive(Path(config.output_dir), [LOCK, *starting])

    started = time.time() - process_age()
    attempts = itertools.count()

    def attempt(fresh: bool) -> ExitReport:
        nonlocal started
        if next(attempts) and load(run_file, overrides) != config:
            raise BadInput(
                f"{run_file}: was changed since the start, and would now describe another run; not "
                "restarted. Undo the changes and rerun the command to resume"
            )
        os.environ[STARTED] = str(started)
        flags = [*(["--fresh"] if fresh else []), *(["--verbose"] if verbose else [])]
        arguments = [run_file, *overrides, *flags]
        if place is not None:
            report = node.run("trainer", arguments, config.output_dir, place)
        else:
            report = start_ranks("trainer", arguments, config.output_dir, processes, hostfile)
        started = time.time()  # of the next attempt
        return report

    _exit_with(restarts.run(attempt, Path(config.output_dir), max_restarts, fresh=fresh))


def _start_options(given: Mapping[str, object]) -> str:
    """Format options, without those that are None or False, as in a shell."""
    words = []
    for name, value in given.items():
        if value is not None and value is not False:
            words += [name] if value is True else [name, str(value)]
    return shlex.join(words)


def validate(
    run_file: RunFile,
    overrides: Overrides = None,
    preview: Annotated[
        int | None,
        option(
            "N",
            "Also print the first N rows of each task as tokens: what the base model reads, "
            "what is learned, and where the virtual tokens are. Loads the tokenizer, no weights.",
            min=1,
        ),
    ] = None,
    json_file: Annotated[
        str | None,
        option(
            "FILE",
            "With --preview: output file for the token ids and labels; -: stdout.",
            "--json",
            callback=as_path,
        ),
    ] = None,
) -> None:
    """Check a run file and all its data without starting a run.

    Tokenizes all rows with the base's tokenizer, as training does; loads no weights.
    Reports all errors at once, each with line, setting, value and a suggested fix.

    **Examples:**

    - `promptshard validate run.yaml training.steps=50`
    - `promptshard validate run.yaml --preview 3`
    - `promptshard validate run.yaml --preview 100 --json rows.json`
    """
    if json_file and preview is None:
        raise BadInput("--json: writes the rows of --preview; add --preview N")
    config = preflight.check_run(run_file, overrides or [])
    options = [] if preview is None else [f"--rows={preview}"]
    if json_file:
        new = json_file if json_file == "-" else preflight.check_new_file(Path(json_file))
        options.append(f"--json={new}")
    arguments = [*options, "--", run_file, *(overrides or [])]
    code = run_alone("trainer.commands.check_rows", arguments, imports="transformers")
    if code:
        raise typer.Exit(code)
    typer.echo(
        f"{run_file}: OK ({count(len(config.prompts), 'prompt')}, "
        f"{count(len(config.tasks), 'task')}, {count(config.last_step, 'step')}; "
        f"base {config.base.model}; output {config.output_dir})",
        err=json_file == "-",
    )


def prepare(
    base: Annotated[str, path_argument("BASE", "A model's folder, GGUF file or hub id.")],
    out: NewFolder,
    revision: Annotated[str | None, option("NAME", "Branch, tag or commit on the hub.")] = None,
    embeddings: Annotated[
        Storage, typer.Option(help="Storage of the word embeddings: unchanged or int8.")
    ] = Storage.KEEP,
    head: Annotated[Storage, typer.Option(help="Storage of the LM head.")] = Storage.KEEP,
) -> None:
    """Convert a base model to int8 once, so later runs load about half as many bytes.

    Use OUT as `base.model` in run files. The output is in bitsandbytes format and also loads in
    transformers, unless embeddings or head are int8 too. Weights are read and written in small
    pieces: the model may be larger than RAM.

    **Example:** `promptshard prepare meta-llama/Llama-3.1-70B bases/llama-70b-int8`
    """
    options = [f"--embeddings={embeddings.value}", f"--head={head.value}"]
    if revision is not None:
        options.append(f"--revision={revision}")
    raise typer.Exit(run_alone("trainer.commands.prepare", [*options, "--", base, out]))


def sync(
    run_dir: RunDir,
    uri: Annotated[
        str | None,
        option(
            "URI",
            "MLflow store to send to. Needed to send credentials of the environment to a "
            "server that only RUN_DIR names. [default: the run's own store]",
        ),
    ] = None,
    register: Annotated[
        str | None,
        option(
            "NAME",
            "register the best prompt of each task as a version of the model NAME; the best "
            "version has the alias `best`. [default: tracking.register]",
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        option(
            "NAME ...",
            "Prompts to register, in place of the best.",
            autocompletion=completion.prompt_names,
        ),
    ] = None,
    more: Annotated[list[str] | None, typer.Argument(hidden=True, metavar="NAME")] = None,
) -> None:
    """Upload metrics and artifacts that MLflow has not received yet.

    All metrics are in `RUN_DIR/metrics.jsonl` first. Safe to repeat. `MLFLOW_TRACKING_TOKEN`,
    `_USERNAME` and `_PASSWORD` are sent only to the server that `MLFLOW_TRACKING_URI` or `--uri`
    names.

    **Examples:**

    - `promptshard sync runs/quickstart`
    - `promptshard sync runs/quickstart --uri https://mlflow.example.org`
    - `promptshard sync runs/quickstart --register triage`
    """
    if more and not prompt:
        raise BadInput(f"{more[0]}: is not expected; name prompts with --prompt {more[0]}")
    prompts = [*(prompt or ()), *(more or ())]
    for name in prompts or [None]:
        preflight.check_result(run_dir, name)
    environment = {k: v for k, v in os.environ.items() if k != URI_VARIABLE}
    if uri:
        environment[URI_VARIABLE] = uri
    options = [f"--register={register}"] if register else []
    options += [f"--prompt={name}" for name in prompts]
    code = run_alone(
        "trainer.commands.sync", ["sync", *options, run_dir], environment, imports="mlflow"
    )
    raise typer.Exit(code)


def _add(group: str, *functions: Callable[..., None], **settings: Any) -> None:
    """Add commands under a heading of ``promptshard --help``; ``settings`` are those of Typer."""
    for function in functions:
        app.command(**{"epilog": EXIT_CODES, "rich_help_panel": group} | settings)(function)


_add(
    "Get started",
    example_commands.example,
    scaffold_commands.examples,
    scaffold_commands.init,
    settings_commands.settings,
    settings_commands.schema,
)
_add("Train", validate, plan_command.plan, prepare, train, slurm_commands.submit)
_add(
    "Train",
    status_commands.status,
    cls=status_commands.StatusCommand,
    epilog=status_commands.STATUS_EPILOG,
)
_add("Train", status_commands.list_, name="list")
_add("Train", sync)
_add("Compare", evaluate_command.evaluate, inspect_command.inspect, lint_command.lint)
_add(
    "Use a prompt",
    predict_command.predict,
    generate_command.generate,
    chat_command.chat,
    serve_command.serve,
    export_command.export,
    push_command.push,
)


def _exit_with(report: ExitReport) -> NoReturn:
    messages.show(report)
    raise typer.Exit(report.code)
