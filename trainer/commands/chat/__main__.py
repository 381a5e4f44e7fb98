"""``python -m trainer.commands.chat RUN_DIR``: the ranks of ``promptshard chat``.

Standard input is a socket; see ``messages``.
"""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Sequence
from pathlib import Path

from trainer.commands.chat.messages import Channel
from trainer.runtime.console import Console
from trainer.runtime.log_folder import inference_logs
from trainer.runtime.process import die_with_parent, fast_imports, flush_and_exit
from trainer.runtime.rank_program import run_guarded


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="promptshard chat")
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path)
    parser.add_argument("--local_rank", type=int, help="given by the launcher; not used")
    folder: Path = parser.parse_args(arguments).run_dir
    die_with_parent()
    rank = int(os.environ.get("RANK", "0"))
    channel = None
    if rank == 0:  # a copy, because standard input is closed next
        channel = Channel(socket.socket(fileno=os.dup(0)))

    def program(console: Console) -> None:
        phase = console.phase("importing torch, transformers and deepspeed", announce=True)
        with phase, fast_imports():
            from trainer.commands.chat.program import chat
        chat(folder, channel, console)

    return run_guarded(rank, inference_logs(folder), program, answers=True)


if __name__ == "__main__":
    flush_and_exit(main())
