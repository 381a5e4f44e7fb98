"""The command ``promptshard chat``."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated

import typer

from launch import chat_process, completion, messages, preflight
from launch.arguments import InferenceProcesses, RunDir, option
from launch.chat_session import ChatSession
from launch.chat_terminal import ChatTerminal
from trainer.inference.saved_run import open_run
from trainer.runtime.errors import EXIT_BAD_INPUT, EXIT_DONE
from trainer.runtime.log_folder import inference_logs


def chat(
    run_dir: RunDir,
    prompt: Annotated[
        str | None,
        option(
            "NAME",
            "Prompt to begin with. [default: the first of the run]",
            autocompletion=completion.prompt_names,
        ),
    ] = None,
    max_new_tokens: Annotated[
        int, option("N", "Maximum number of tokens of an answer.", min=1)
    ] = 256,
    processes: InferenceProcesses = None,
) -> None:
    """Talk to the base with trained prompts.

    The base is loaded once. A prompt that was trained on dialogues reads the dialogue so far, as
    the base's chat template writes it; another one reads each message in its task's template
    (`/template` changes that). Commands: `/use NAME`, `/none`, `/compare A B`, `/system TEXT`,
    `/template chat|task`, `/clear`, `/save FILE`, `/help`, `/quit`.

    Ctrl-C stops an answer, not the program. From a pipe, every line is a message or a command.

    **Examples:**

    - `promptshard chat runs/quickstart --prompt triage`
    - `promptshard chat runs/quickstart < questions.txt`
    """
    preflight.check_result(run_dir)
    run = open_run(run_dir)
    if prompt is not None:
        (chosen,) = run.selected([prompt])
    else:
        chosen = next(iter(run.prompts.values()))
    terminal = ChatTerminal(["/" + name for name in ChatSession.COMMANDS], list(run.prompts))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with chat_process.engine(run_dir, processes) as engine:
            session = ChatSession(run, engine, terminal, chosen.name, max_new_tokens)
            started = session.has_started()
            code = session.run() if started else engine.exit_code()
    finally:
        signal.signal(signal.SIGINT, before)
    if code not in (EXIT_DONE, EXIT_BAD_INPUT):  # the ranks have printed what is invalid
        logs = inference_logs(Path(run_dir))
        messages.failure(f"the processes have ended; see the logs in {logs}")
    raise typer.Exit(code)
