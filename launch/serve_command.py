"""The command ``promptshard serve``."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from launch import completion, messages, preflight
from launch.arguments import Processes, RunDir, as_path, option
from launch.start import start_ranks
from trainer.commands.serve import options as serving
from trainer.commands.serve.options import Options
from trainer.inference.saved_run import open_run
from trainer.runtime.errors import BadInput


def serve(
    run_dir: RunDir,
    prompt: Annotated[
        list[str] | None,
        option(
            "NAME",
            "Serve only this prompt, besides the base; repeatable. [default: all]",
            autocompletion=completion.prompt_names,
        ),
    ] = None,
    host: Annotated[
        str,
        option(
            "ADDRESS",
            "Address to listen on; 0.0.0.0: all of this machine, so that others can connect.",
        ),
    ] = serving.HOST,
    port: Annotated[
        int,
        option("P", "Port to listen on; 0: a free one.", min=0, max=65535),
    ] = serving.PORT,
    processes: Processes = None,
    max_concurrent: Annotated[
        int,
        option("N", "Answers that are generated at the same time, if they fit in memory.", min=1),
    ] = serving.CONCURRENT,
    max_waiting: Annotated[
        int,
        option("N", "Further answers that wait; more are refused with status 429.", min=1),
    ] = serving.WAITING,
    max_tokens: Annotated[
        int | None,
        option("N", "Largest max_tokens of a request. [default: what the context allows]", min=1),
    ] = None,
    max_request_bytes: Annotated[
        int,
        option("N", "Largest body of a request; larger ones are refused with status 413.", min=1),
    ] = serving.REQUEST_BYTES,
    token_file: Annotated[
        str | None,
        option(
            "FILE",
            "File with the token that clients must send. [default: the environment variable "
            f"{serving.TOKEN_VARIABLE}, if set]",
            callback=as_path,
        ),
    ] = None,
    no_token: Annotated[
        bool,
        typer.Option("--no-token", help="Let other machines connect without a token."),
    ] = False,
) -> None:
    """Serve the prompts of a run over HTTP, with OpenAI's API.

    `model` names the prompt; `base` is the base without a prompt. Requests for different prompts
    are decoded in one batch over one base. Paths: `/v1/models`, `/v1/completions`,
    `/v1/chat/completions`, `/health`, `/metrics` (Prometheus).

    A text sent to `/v1/completions` fills the input template of the prompt's task if that has one
    column that is not optional, as in `promptshard generate`. `/v1/chat/completions` uses the chat
    template of the base.
    Decoding is greedy unless a request sets `temperature`.

    For trying, tests and small teams. For many users, export the prompts to vLLM. Needs
    `pip install 'promptshard[serve]'`.

    **Examples:**

    - `promptshard serve runs/quickstart`
    - `curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' -d '{"model":
      "triage", "prompt": "Chest pain."}'`
    - `promptshard serve runs/quickstart --host 0.0.0.0 --token-file ~/.promptshard-token`
    """
    missing = [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise BadInput(
            f"serve needs {' and '.join(missing)}; run: pip install 'promptshard[serve]'"
        )
    options = Options(
        Path(run_dir),
        tuple(prompt or ()),
        host,
        port,
        token_file,
        no_token,
        max_concurrent,
        max_waiting,
        max_tokens,
        max_request_bytes,
    )
    preflight.check_folder(run_dir)
    open_run(run_dir).selected(options.prompts)
    options.read_token()
    options.bind().close()
    report = start_ranks(
        "trainer.commands.serve", options.arguments(), run_dir, processes, None, single=True
    )
    messages.show(report)
    raise typer.Exit(report.code)
