"""``python -m trainer.commands.sync``: upload to MLflow, once (``sync``) or during training.

The trainer starts ``follow`` in the background. The store's address may contain a password, so it
is passed in the environment variable ``PROMPTSHARD_TRACKING_URI`` and not as an argument.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from trainer.runtime.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILURE, BadInput
from trainer.runtime.redact import printable, redact
from trainer.tracking.process_client import URI_VARIABLE


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer.commands.sync")
    commands = parser.add_subparsers(dest="command", required=True)
    sync = commands.add_parser("sync", help="upload what MLflow has not received yet")
    sync.add_argument("--register", help="name of a registered model")
    sync.add_argument("--prompt", action="append", default=[], help="prompt to register")
    sync.add_argument("run_dir", type=Path, help="output folder of the run")
    follow = commands.add_parser("follow", help="started by the trainer")
    follow.add_argument("options")
    chosen = parser.parse_args(arguments)
    uri = os.environ.pop(URI_VARIABLE, None)
    if chosen.command == "follow":
        from trainer.reporting.mlflow_note import read_results
        from trainer.tracking import sender_process

        with contextlib.suppress(OSError):
            os.nice(10)  # lower priority than training
        return sender_process.main(chosen.options, uri, read_results)
    return _sync(chosen.run_dir, uri, chosen.register, chosen.prompt)


def _sync(run_dir: Path, uri: str | None, register: str | None, prompts: Sequence[str]) -> int:
    from trainer.reporting.html import write_missing_report
    from trainer.reporting.mlflow_note import read_results
    from trainer.reporting.summary import finished_summary
    from trainer.tracking.pusher import sync

    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")
    logging.getLogger("alembic").setLevel(logging.ERROR)
    try:
        if finished_summary(run_dir) is not None:
            write_missing_report(run_dir, lambda text: print(f"warning: {text}", file=sys.stderr))
        result = sync(run_dir, read_results, uri, register, prompts)
    except BadInput as error:
        print(printable(redact(str(error))), file=sys.stderr)
        return EXIT_BAD_INPUT
    print(printable(result.message), file=sys.stdout if result.complete else sys.stderr)
    return EXIT_DONE if result.complete else EXIT_FAILURE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
