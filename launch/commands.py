"""The commands of ``promptshard``. No torch, so that they answer at once."""

from __future__ import annotations

import enum
import os
from pathlib import Path
from typing import Annotated

import typer

from launch import __version__, cluster, local, messages, node, preflight, restarts
from launch.arguments import EXIT_CODES, Overrides, Processes, RunDir, RunFile, as_path
from launch.endings import Ending
from launch.starting import count, run_alone, start_ranks
from trainer.config import RunConfig
from trainer.errors import EXIT_RESUMABLE, BadInput
from trainer.lock import refuse_if_alive
from trainer.process import ROWS_CHECKED
from trainer.tracking.sender import URI_VARIABLE

app = typer.Typer(
    help="Train soft prompts for frozen language models that are too big for one GPU.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Stored(str, enum.Enum):
    """How a part of the base is stored; as base.embeddings and base.head in the run file."""

    KEEP = "keep"
    INT8 = "int8"


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"promptshard {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say it and end.")
    ] = False,
) -> None:
    pass


@app.command(epilog=EXIT_CODES)
def train(
    run_file: RunFile,
    overrides: Overrides = None,
    processes: Processes = None,
    hostfile: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            callback=as_path,
            help="Several machines, reached with ssh and pdsh: one `HOST slots=GPUS` a line.",
        ),
    ] = None,
    no_ssh: Annotated[
        bool,
        typer.Option(
            "--no-ssh", help="Start only this host's part; give the command on every host."
        ),
    ] = False,
    node_rank: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="With --no-ssh: which host of the hostfile this is, from 0."
        ),
    ] = None,
    master_addr: Annotated[
        str | None,
        typer.Option(metavar="A", help="With --no-ssh: where all meet. [default: the first host]"),
    ] = None,
    master_port: Annotated[
        int | None,
        typer.Option(metavar="P", help=f"With --no-ssh: its port. [default: {node.DEFAULT_PORT}]"),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start anew where output_dir holds an earlier run.")
    ] = False,
    max_restarts: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=0,
            help="After a failure, go on from the last checkpoint, N times at most. One machine.",
        ),
    ] = 0,
) -> None:
    """Train the prompts of a run file over one sharded base.

    The run file and every row are checked first. Then the DeepSpeed launcher starts one process
    per GPU; it can also be called by hand: `deepspeed --module trainer RUN.yaml`. Ctrl-C ends all
    processes, with the step saved. Logs of every process stand in `output_dir/logs`.

    **Examples:**

    - `promptshard train examples/quickstart.yaml`
    - `promptshard train run.yaml training.steps=50 output_dir=runs/short --processes 1`
    - `promptshard train run.yaml --max-restarts 3`
    - `promptshard train run.yaml --hostfile hosts`
    - `promptshard train run.yaml --hostfile hosts --no-ssh --node-rank 1` (on the second host)
    """
    overrides = overrides or []
    place = None
    if no_ssh:
        place = _place(hostfile, node_rank, master_addr, master_port, processes)
    elif (node_rank, master_addr, master_port) != (None, None, None):
        raise BadInput("--node-rank, --master-addr and --master-port go with --no-ssh; add it")
    if max_restarts and hostfile and not local.is_local(local.read_hostfile(hostfile)):
        raise BadInput(
            f"--max-restarts: goes with one machine, and {hostfile} names others; on Slurm, a job "
            "of promptshard submit is requeued when it loses a node"
        )
    config = preflight.check_run(run_file, overrides)
    os.environ[ROWS_CHECKED] = "1"
    refuse_if_alive(Path(config.output_dir))

    def attempt(fresh: bool) -> Ending:
        """Start all ranks, at a port that is free now, and wait for them."""
        arguments = [run_file, *overrides, *(["--fresh"] if fresh else [])]
        if place is not None:
            return node.run("trainer", arguments, config.output_dir, place)
        return start_ranks("trainer", arguments, config.output_dir, processes, hostfile)

    _end_with(restarts.run(attempt, Path(config.output_dir), max_restarts, fresh=fresh))


@app.command(epilog=EXIT_CODES)
def validate(run_file: RunFile, overrides: Overrides = None) -> None:
    """Check a run file and every row it names, and start nothing.

    All mistakes are reported at once, each with its line, the setting, its value and the remedy.

    **Example:** `promptshard validate run.yaml training.steps=50`
    """
    config = preflight.check_run(run_file, overrides or [])
    typer.echo(
        f"{run_file}: good: {count(len(config.prompts), 'prompt')}, "
        f"{count(len(config.tasks), 'task')}, {count(config.last_step, 'step')} "
        f"on {config.base.model}, into {config.output_dir}"
    )


@app.command(epilog=EXIT_CODES)
def generate(
    run_dir: RunDir,
    prompt: Annotated[str, typer.Option(metavar="NAME", help="Which prompt of the run.")],
    text: Annotated[
        str,
        typer.Option(
            "--input",
            metavar="TEXT",
            help="Input text. Filled into the task's input template if that has exactly one "
            "column; otherwise used verbatim.",
        ),
    ],
    max_new_tokens: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Length limit. [default: the task's]")
    ] = None,
    processes: Processes = None,
) -> None:
    """Generate text with a trained prompt.

    Stdout gets the text and nothing else. It ends at an end token of the base model's
    generation_config.json, at EOS if the task has append_eos, or before a string of the task's
    stop.

    **Example:** `promptshard generate runs/quickstart --prompt triage --input "Chest pain."`
    """
    preflight.check_result(run_dir, prompt)
    # NAME=VALUE in one word: a text may start with a dash
    arguments = [run_dir, f"--prompt={prompt}", f"--input={text}"]
    if max_new_tokens is not None:
        arguments.append(f"--max-new-tokens={max_new_tokens}")
    _end_with(start_ranks("trainer.generate", arguments, run_dir, processes, None))


@app.command(epilog=EXIT_CODES)
def prepare(
    base: Annotated[
        str, typer.Argument(metavar="BASE", callback=as_path, help="A model's folder or hub id.")
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", callback=as_path, help="A new folder.")],
    revision: Annotated[
        str | None, typer.Option(metavar="NAME", help="Branch, tag or commit of a hub id.")
    ] = None,
    embeddings: Annotated[
        Stored, typer.Option(help="Word embeddings: as they are, or in 8 bits too.")
    ] = Stored.KEEP,
    head: Annotated[Stored, typer.Option(help="The same for the head.")] = Stored.KEEP,
) -> None:
    """Write a base in 8 bits, so that every later run reads nearly half the bytes.

    Name OUT as base.model in run files. It is in the format of bitsandbytes, which transformers
    loads too unless embeddings or head are in 8 bits. Weights are read and written in small pieces:
    a model may be larger than the memory.

    **Example:** `promptshard prepare meta-llama/Llama-3.1-70B bases/llama-70b-int8`
    """
    options = [f"--embeddings={embeddings.value}", f"--head={head.value}"]
    if revision is not None:
        options.append(f"--revision={revision}")
    arguments = [*options, "--", base, out]
    _end(run_alone("trainer.prepare", arguments))


@app.command(epilog=EXIT_CODES)
def export(
    run_dir: RunDir,
    out: Annotated[str, typer.Argument(metavar="OUT", callback=as_path, help="A new folder.")],
    encoder: Annotated[
        str,
        typer.Option(metavar="NAME", help="A share, or a prompt, with encoder: text."),
    ],
    text: Annotated[str, typer.Option(metavar="TEXT", help="What the new task is, in words.")],
) -> None:
    """Make a prompt of a new text with a trained text encoder, and train nothing.

    OUT becomes a PEFT adapter. The encoder is as of its best validation or, without one, of the
    newest checkpoint; of the base only the embeddings of the text's words are read.

    **Example:** `promptshard export runs/notes urgency --encoder reader --text "Is it urgent?"`
    """
    preflight.check_result(run_dir)
    # NAME=VALUE in one word: a text may start with a dash
    options = [f"--encoder={encoder}", f"--text={text}"]
    arguments = [*options, "--", run_dir, out]
    _end(run_alone("trainer.encode", arguments))


@app.command(epilog=EXIT_CODES)
def inspect(
    target: Annotated[
        str,
        typer.Argument(
            metavar="RUN.yaml|RUN_DIR|MODEL",
            callback=as_path,
            help="A run file, the output_dir of a run, or a model's folder or hub id.",
        ),
    ],
    overrides: Overrides = None,
    base: Annotated[
        bool, typer.Option("--base", help="Look at the base: what storing it in int8 costs.")
    ] = False,
    rows: Annotated[
        int, typer.Option(metavar="N", min=1, help="Validation rows of each task that are scored.")
    ] = 64,
    json_file: Annotated[
        str | None,
        typer.Option(
            "--json",
            metavar="FILE",
            callback=as_path,
            help="Output file for all numbers; -: stdout. "
            "[default: base_inspection.json in a RUN_DIR]",
        ),
    ] = None,
    processes: Processes = None,
) -> None:
    """Measure what int8 does to a base: to its weights, and to the losses of its prompts.

    Of every weight that int8 rounds: the relative error, that of its worst row, and the share of
    rows with an outlier, in one line per layer. Then the validation loss of no prompt, of the
    hand-written and, in a RUN_DIR, of the trained prompts: over the base as it was published,
    and over int8 with each base.matmul that works here. Of a MODEL alone, the weights only.

    **Examples:**

    - `promptshard inspect run.yaml --base base.head=int8`
    - `promptshard inspect runs/quickstart --base --rows 200`
    - `promptshard inspect meta-llama/Llama-3.1-8B --base base.embeddings=int8 --json errors.json`
    """
    if not base:
        raise BadInput(
            "inspect: say what to look at: --base measures what int8 costs the base, in its "
            "weights and in validation losses"
        )
    found = preflight.check_target(target, overrides or [])
    if json_file is None and preflight.is_run_dir(target):
        json_file = str(Path(target) / "base_inspection.json")
    # NAME=VALUE in one word, as a name may start with a dash
    options = []
    if json_file:
        new = json_file if json_file == "-" else preflight.check_new_file(Path(json_file))
        options = [f"--json={new}"]
    arguments = [target, *(overrides or []), *options]
    if isinstance(found, RunConfig):
        arguments.append(f"--rows={rows}")
        _end_with(start_ranks("trainer.inspect", arguments, found.output_dir, processes, None))
    else:
        _end(run_alone("trainer.inspect", ["--model", *arguments]))


@app.command(epilog=EXIT_CODES)
def sync(
    run_dir: RunDir,
    uri: Annotated[
        str | None,
        typer.Option(
            metavar="URI",
            help="MLflow store to send to. Needed to send credentials of the environment to a "
            "server that only RUN_DIR names. [default: the run's own store]",
        ),
    ] = None,
) -> None:
    """Upload metrics and artifacts that MLflow has not received yet.

    All metrics are in `RUN_DIR/metrics.jsonl` first. Safe to repeat. `MLFLOW_TRACKING_TOKEN`,
    `_USERNAME` and `_PASSWORD` are sent only to the server that `MLFLOW_TRACKING_URI` or `--uri`
    names.

    **Examples:**

    - `promptshard sync runs/quickstart`
    - `promptshard sync runs/quickstart --uri https://mlflow.example.org`
    """
    preflight.check_result(run_dir)
    environment = {k: v for k, v in os.environ.items() if k != URI_VARIABLE}
    if uri:
        environment[URI_VARIABLE] = uri
    _end(run_alone("trainer.tracking", ["sync", run_dir], environment))


app.command(epilog=EXIT_CODES)(cluster.submit)
app.command(epilog=EXIT_CODES)(cluster.status)


def _place(
    hostfile: str | None,
    rank: int | None,
    address: str | None,
    port: int | None,
    count: int | None,
) -> local.Place:
    if hostfile is None:
        raise BadInput("--no-ssh: name all hosts with --hostfile; it is the same on each of them")
    if count is not None:
        raise BadInput("--processes: with --no-ssh, the hostfile says how many: HOST slots=NUMBER")
    return node.place_of(hostfile, rank, address, port)


def _end_with(ending: Ending) -> None:
    if ending.message and ending.code == EXIT_RESUMABLE:
        messages.note(ending.message)
    elif ending.message:
        messages.failure(ending.message)
    _end(ending.code)


def _end(code: int) -> None:
    raise typer.Exit(code)
