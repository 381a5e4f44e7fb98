"""The command ``promptshard push``: upload an adapter with its card to the Hugging Face hub."""

from __future__ import annotations

import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from launch import completion, messages, preflight
from launch.arguments import RunDir, option
from trainer.prompts.saved_prompts import SEGMENT, SETTINGS, WEIGHTS, tensor_shapes
from trainer.runtime.errors import EXIT_FAILURE, BadInput
from trainer.runtime.json_file import read_json_object
from trainer.runtime.redact import redact

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

#: The only files that are uploaded.
FILES = (CARD := "README.md", SETTINGS, WEIGHTS, SEGMENT)
#: ``name`` or ``owner/name`` of the hub.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_TOKEN_HELP = "set HF_TOKEN, or run: hf auth login"


@dataclass(frozen=True)
class Upload:
    """What is uploaded, and where."""

    repo: str
    revision: str | None
    private: bool
    files: dict[str, bytes]

    def describe(self, endpoint: str) -> str:
        access = "private" if self.private else "public"
        listed = ", ".join(f"{name} ({len(data):,} B)" for name, data in self.files.items())
        return (
            f"upload to {endpoint}/{self.repo} ({access} if it is new, revision "
            f"{self.revision or 'main'}): {listed}; the base is not uploaded"
        )


def push(
    run_dir: RunDir,
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Repository: OWNER/NAME.")],
    prompt: Annotated[
        str, option("NAME", "The trained prompt.", autocompletion=completion.prompt_names)
    ],
    private: Annotated[
        bool, typer.Option("--private", help="Create the repository as private.")
    ] = False,
    revision: Annotated[
        str | None, option("BRANCH", "Branch, created if needed. [default: main]")
    ] = None,
    base_model: Annotated[
        str | None,
        option(
            "ID",
            "Hub id of the base, if the run names it by a path of this machine: it replaces the "
            "path in the uploaded files.",
        ),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Upload without asking.")] = False,
) -> None:
    """Upload a trained prompt with its model card to the Hugging Face hub.

    Only the adapter and its card are uploaded, in one commit: no base, no checkpoints, no rows. In
    a card, paths of this machine are replaced. The token is that of `HF_TOKEN` or of
    `hf auth login`; `HF_ENDPOINT` names another hub.

    **Examples:**

    - `promptshard push runs/quickstart me/triage-prompt --prompt triage --base-model me/tiny-base`
    - `promptshard push runs/notes me/notes --prompt notes --private` (a base of the hub)
    """
    preflight.check_result(run_dir, prompt)
    upload = collect(Path(run_dir), repo, prompt, private, revision, base_model)
    from huggingface_hub import constants, get_token  # takes half a second

    if constants.HF_HUB_OFFLINE:
        raise BadInput("push: HF_HUB_OFFLINE is set; unset it, on a machine with network access")
    token = get_token()
    if token is None:
        raise BadInput(f"push: no access token for the hub was found; {_TOKEN_HELP}")
    messages.note(upload.describe(constants.ENDPOINT))
    if not yes:
        if not sys.stdin.isatty():
            raise BadInput("--yes: is needed to upload without a terminal; add it")
        typer.confirm("Upload?", abort=True, err=True)
    print(send(upload, token))


def collect(
    run_dir: Path,
    repo: str,
    name: str,
    private: bool,
    revision: str | None,
    base_model: str | None,
) -> Upload:
    """Read the files of an adapter, and replace paths of this machine in them.

    Raises:
        BadInput: no finished adapter, not a hub id, or a base without one.
    """
    for text, what in ((repo, "REPO"), (base_model, "--base-model")):
        if text is not None and (not _HUB_ID.fullmatch(text) or ".." in text or "--" in text):
            raise BadInput(f"{what}: {text!r} is not a name of the hub; use OWNER/NAME")
    adapter = run_dir / "prompts" / name
    if not (adapter / WEIGHTS).is_file():
        raise BadInput(f"{run_dir}: prompt {name!r} is not saved yet; finish the run first")
    tensor_shapes(adapter)  # is a valid safetensors file
    settings = read_json_object(adapter / SETTINGS)
    base = str(settings.get("base_model_name_or_path"))
    if base_model is None and (os.path.exists(base) or not _HUB_ID.fullmatch(base)):
        raise BadInput(
            f"push: the base of this prompt, {base!r}, is a path of this machine, which no one "
            "else can load; name it on the hub: --base-model OWNER/NAME"
        )
    files = {file: (adapter / file).read_bytes() for file in FILES if (adapter / file).is_file()}
    if base_model is not None:
        settings["base_model_name_or_path"] = base_model
        files[SETTINGS] = json.dumps(settings, indent=2).encode()
    if CARD in files:
        card = files[CARD].decode()
        for path, public in (
            (str(adapter.resolve()), repo),
            (str(run_dir.resolve()), "RUN_DIR"),
            (base, base_model or base),
        ):
            card = card.replace(path, public)
        files[CARD] = card.encode()
    return Upload(repo, revision, private, files)


def send(upload: Upload, token: str) -> str:
    """Upload the files in one commit; return the address of the repository.

    Raises:
        BadInput: the hub rejects the token, the repository or the files.
        typer.Exit: the hub cannot be reached, or fails.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    hub = HfApi(token=token)
    try:
        url = hub.create_repo(upload.repo, private=upload.private, exist_ok=True)
        repo = url.repo_id  # with the owner
        if upload.revision is not None and upload.revision != "main":
            hub.create_branch(repo, branch=upload.revision, exist_ok=True)
        messages.note(f"uploading {sum(map(len, upload.files.values())):,} bytes")
        hub.create_commit(
            repo,
            [CommitOperationAdd(name, data) for name, data in upload.files.items()],
            commit_message="Upload a soft prompt trained by promptshard",
            revision=upload.revision,
        )
    except HfHubHTTPError as error:
        _explain(error, upload, token)
    except ValueError as error:  # the hub rejects the front matter of the card
        raise BadInput(f"push: {redact(str(error), [token])}; edit {CARD} of the adapter") from None
    except Exception as error:
        if not _is_network_error(error):
            raise
        reason = redact(str(error), [token]) or type(error).__name__
        messages.failure(
            f"push: the hub {hub.endpoint} cannot be reached ({reason}); check the network and "
            "HF_ENDPOINT, then push again: nothing changes until the upload is complete"
        )
        raise typer.Exit(EXIT_FAILURE) from None
    return str(url)


def _is_network_error(error: Exception) -> bool:
    """Whether the hub could not be reached. Releases of the library use httpx or httpx2."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return bool(kinds & {"TransportError", "OSError"})


def _explain(error: HfHubHTTPError, upload: Upload, token: str) -> NoReturn:
    """Raise the error that fits a refusal of the hub."""
    status = error.response.status_code
    detail = redact((error.server_message or "").strip().split("\n")[0], [token])
    reason = f" ({detail})" if detail else ""
    if status == 401:
        raise BadInput(f"push: the hub does not accept the token{reason}; {_TOKEN_HELP}") from None
    if status == 403:
        raise BadInput(
            f"push: the token may not write to {upload.repo}{reason}; use a token with the role "
            "write, and an owner that you belong to"
        ) from None
    if status == 404:
        raise BadInput(
            f"push: the hub has no {upload.repo}, or the token may not see it{reason}; check OWNER "
            "and the token"
        ) from None
    if status < 500 and status != 429:
        raise BadInput(f"push: the hub rejects the upload, with status {status}{reason}") from None
    messages.failure(f"push: the hub failed with status {status}{reason}; push again later")
    raise typer.Exit(EXIT_FAILURE) from None
