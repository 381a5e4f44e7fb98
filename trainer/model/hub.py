"""Download files of a base from the hub into huggingface_hub's cache, unless they are cached.

The library's environment variables apply: HF_HUB_OFFLINE, HF_HUB_CACHE, HF_TOKEN, HF_ENDPOINT.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import constants, get_safetensors_metadata, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    NotASafetensorsRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import tqdm

from trainer.config import Base
from trainer.runtime.errors import BadInput

#: Type, shape and bytes of a stored tensor.
TensorHeader = tuple[str, Sequence[int], int]
#: Called with the bytes downloaded so far and the total known so far.
Progress = Callable[[int, int], None]


def fetch(
    settings: Base,
    names: Sequence[str],
    *,
    download: bool,
    progress: Progress | None = None,
) -> Path:
    """Return the cached folder of one commit that contains the given files.

    Args:
        names: files or patterns in the model's top folder. Subfolders hold other formats.

    Raises:
        BadInput: with the reason why the model is not available.
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


def read_headers(settings: Base) -> dict[str, TensorHeader]:
    """Read the headers of a model's weight files by range requests, without their weights.

    Raises:
        BadInput: with the reason why the model is not available.
    """
    try:
        files = get_safetensors_metadata(settings.model, revision=settings.revision).files_metadata
    except NotASafetensorsRepoError:
        raise BadInput(
            f"base.model: {settings.model!r} has no weights in safetensors on the hub"
        ) from None
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise BadInput(_problem(settings, error)) from None
    return {
        name: (str(tensor.dtype), tensor.shape, tensor.data_offsets[1] - tensor.data_offsets[0])
        for file in files.values()
        for name, tensor in file.tensors.items()
    }


def _problem(settings: Base, error: Exception) -> str:
    name = settings.model
    head = f"base.model: {name!r} is not a folder here ({os.getcwd()})"
    if isinstance(error, GatedRepoError):
        page = f"{constants.ENDPOINT}/{name}"
        return f"{head}, and gated on the hub: accept its terms on {page}, then set HF_TOKEN"
    if isinstance(error, RepositoryNotFoundError):
        return f"{head}, and the hub has no such model; check the name, or set HF_TOKEN if private"
    if isinstance(error, RevisionNotFoundError):
        return f"base.revision: {settings.revision!r} is not a branch, tag or commit of {name!r}"
    if isinstance(error, HFValidationError):
        return f"{head}, nor is it a valid hub id; use a folder or an id such as org/name"
    if isinstance(error, LocalEntryNotFoundError) and constants.HF_HUB_OFFLINE:
        at = f"{name} --revision {settings.revision}" if settings.revision else name
        return (
            f"{head}, not complete in the hub's cache ({constants.HF_HUB_CACHE}), and "
            f"HF_HUB_OFFLINE is set; on a machine with network access, run: hf download {at}"
        )
    reason = str(error).strip().split("\n")[0]
    return f"{head}, and could not be downloaded from the hub: {type(error).__name__}: {reason}"


def _bar(progress: Progress | None) -> type[tqdm]:
    """Progress bar class for huggingface_hub that calls ``progress`` instead of printing."""

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            # The library's other bars count files or compressed bytes.
            self._counts_bytes = kwargs.get("name") == "huggingface_hub.snapshot_download"
            self._done = 0
            super().__init__(*args, **kwargs | {"disable": True})

        def update(self, n: float | None = 1) -> None:
            self._done += int(n or 0)
            self.refresh()

        def refresh(self, *args: Any, **kwargs: Any) -> None:
            if self._counts_bytes and progress is not None and self.total:
                progress(self._done, int(self.total))

    return Bar
