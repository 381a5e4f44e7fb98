"""End a run: send the remaining metrics, and write ``summary.json`` if the run failed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from trainer.checkpointing.run_lock import LockLost
from trainer.reporting.summary import SUMMARY_FILE, RunSummary, save_summary
from trainer.runtime.console import Console
from trainer.runtime.redact import redact
from trainer.tracking import TrackingClient

#: Time limits of sending at the end: to a local store, which can be slow; to a server, which can be
#: down; after a failure; after a stop signal, when the state is saved.
LOCAL_STORE_SECONDS, SERVER_SECONDS, FAILED_SECONDS, STOPPED_SECONDS = 90.0, 20.0, 3.0, 10.0
#: Additional limit for each prompt: its run, files and model take about 20 requests. The sender of
#: a server that is down or hangs ends earlier by itself.
PROMPT_SECONDS = 2.0
#: The same after a stop signal, when only the status of each prompt's run is left to send.
PROMPT_STATUS_SECONDS = 0.25


@contextmanager
def tracked_run(output: Path, client: TrackingClient, console: Console) -> Iterator[None]:
    """Send metrics during the ``with`` block; write a summary with the error if it fails."""
    (output / SUMMARY_FILE).unlink(missing_ok=True)
    client.start()
    try:
        yield
    except Exception as error:
        summary = RunSummary(status="failed", error=redact(str(error)))
        if not isinstance(error, LockLost):  # another process owns the folder
            with suppress(OSError):  # a full disk must not hide the error
                save_summary(output, summary)
        # Print the error before waiting for the tracker: the launcher ends this rank a second after
        # another rank has failed.
        console.failure(error)
        client.finish(FAILED_SECONDS)
        raise
    except KeyboardInterrupt:  # the same command resumes the run
        client.finish(STOPPED_SECONDS + PROMPT_STATUS_SECONDS * client.num_prompts)
        raise
    else:
        finish_sending(client, console)


def finish_sending(client: TrackingClient, console: Console) -> None:
    """Wait until the remaining metrics are sent, within time limits, and print the result."""
    seconds = LOCAL_STORE_SECONDS if client.is_local else SERVER_SECONDS
    with console.phase("sending metrics to MLflow"):
        finished = client.finish(seconds + PROMPT_SECONDS * client.num_prompts)
    if finished.complete:
        message = finished.message.replace("\n", f"\n{' ' * 9}")
        console.print(f"curves:  {message}")
    else:
        console.warn(finished.message)
