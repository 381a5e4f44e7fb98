"""A base from the hub: its files in huggingface_hub's own cache, downloaded where they are missing.

Honours that library's variables: HF_HUB_OFFLINE, HF_HUB_CACHE, HF_TOKEN, HF_ENDPOINT.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import tqdm

from trainer.config import Base
from trainer.runtime.errors import BadInput

#: Called with the bytes that are here and those known to come in all.
Progress = Callable[[int, int], None]


def fetch(
    settings: Base,
    names: Sequence[str],
    *,
    download: bool,
    progress: Progress | None = None,
) -> Path:
    """The cached folder of one commit, with these files of the model.

    Args:
        names: files, or patterns, of the model's top folder: what lies deeper is kept in other
            formats, or for other programs.
        download: what is missing; False looks into the cache only.

    Raises:
        BadInput: naming the model, and why it cannot be had.
    """
    try:
        return Path(
            snapshot_download(
                settings.model,
                revision=settings.revision,
                allow_patterns=list(names),
                ignore_patterns=["*/*"],
                local_files_only=not download,
                tqdm_class=_bar(progress),
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise BadInput(_problem(settings, error)) from None


def _problem(settings: Base, error: Exception) -> str:
    name = settings.model
    head = f"base.model: {name!r} is not a folder here ({os.getcwd()})"
    if isinstance(error, GatedRepoError):
        page = f"{constants.ENDPOINT}/{name}"
        return f"{head}, and gated on the hub: accept its terms on {page}, then set HF_TOKEN"
    if isinstance(error, RepositoryNotFoundError):
        return f"{head}, and the hub has no such model; check the name, or set HF_TOKEN if private"
    if isinstance(error, RevisionNotFoundError):
        return f"base.revision: {settings.revision!r} is no branch, tag or commit of {name!r}"
    if isinstance(error, HFValidationError):
        return f"{head}, nor can it be a hub id; name a folder or an id such as org/name"
    if isinstance(error, LocalEntryNotFoundError) and constants.HF_HUB_OFFLINE:
        at = f"{name} --revision {settings.revision}" if settings.revision else name
        return (
            f"{head}, not whole in the hub's cache ({constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE "
            f"is set; where there is a network: hf download {at}"
        )
    reason = str(error).strip().split("\n")[0]
    return f"{head}, and was not got from the hub: {type(error).__name__}: {reason}"


def _bar(progress: Progress | None) -> type[tqdm]:
    """A bar of the library's that draws nothing and tells ``progress`` what it would have drawn."""

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            # Others of its bars count files, or what came over the wire compressed.
            self._shown = kwargs.get("name") == "huggingface_hub.snapshot_download"
            self._done = 0
            super().__init__(*args, **kwargs | {"disable": True})

        def update(self, n: float | None = 1) -> None:
            self._done += int(n or 0)
            self.refresh()

        def refresh(self, *args: Any, **kwargs: Any) -> None:
            if self._shown and progress is not None and self.total:
                progress(self._done, int(self.total))

    return Bar
