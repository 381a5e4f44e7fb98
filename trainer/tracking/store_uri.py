"""Choose the MLflow store of a run, and the credentials that may be sent to it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import shlex
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit, urlunsplit

from trainer.config.tracking import HTTP, OTHERS, problem_of_uri, scheme_of
from trainer.runtime.errors import BadInput
from trainer.runtime.redact import HIDDEN, is_distinct, redact, secrets_of
from trainer.tracking.progress_file import FILE as STATE_FILE
from trainer.tracking.progress_file import ProgressFile
from trainer.tracking.sqlite_store import sqlite_uri

#: MLflow's own defaults, in the working directory: database and artifact folder.
DATABASE, ARTIFACTS = "mlflow.db", "mlruns"
_TOKEN_NAMES = ("token", "access_token")
_PORTS = {"http": 80, "https": 443}
#: Credentials that MLflow sends to any server it is configured for.
_CREDENTIALS = (
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "MLFLOW_TRACKING_AUTH",
    "MLFLOW_TRACKING_AWS_SIGV4",
    "MLFLOW_TRACKING_CLIENT_CERT_PATH",
    "NETRC",
)

#: A call that hangs delays the next one, not the trainer. Values that the user has set are kept.
_LIMITS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # the next round is the retry
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}
#: Calls that MLflow makes in a thread report no errors: lost points would count as sent.
_FIXED = {"MLFLOW_ENABLE_ASYNC_LOGGING": "false"}


@dataclass(frozen=True)
class StoreAddress:
    """An MLflow store."""

    uri: str = field(repr=False)  #: for MLflow; a server's has no credentials
    name: str  #: the address without any secret, to show and to write to files
    artifacts: str | None = None  #: address of the artifact folder; None: the store decides
    credentials: dict[str, str] = field(default_factory=dict, repr=False)
    secrets: tuple[str, ...] = field(default=(), repr=False)  #: texts to hide in all output
    trusted: bool = True  #: credentials of the environment and the home folder may be sent there

    @property
    def database(self) -> Path | None:
        """The file of an SQLite store, else None."""
        if scheme_of(self.name) != "sqlite":
            return None
        return Path(unquote(self.name.partition(":///")[2]))

    def apply(self, environment: MutableMapping[str, str]) -> None:
        """Set the environment for MLflow; hide all credentials from an untrusted server."""
        if not self.trusted:
            for name in _CREDENTIALS:
                environment.pop(name, None)
            environment["HOME"] = os.devnull  # .mlflow/credentials, .netrc, ...
        environment.update({**_LIMITS, **environment, **_FIXED, **self.credentials})
        environment["MLFLOW_TRACKING_URI"] = self.uri

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """``apply`` to this process inside the block."""
        before = dict(os.environ)
        self.apply(os.environ)
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)

    def hide(self, text: str) -> str:
        return redact(text, self.secrets)


def resolve(output_dir: Path, given: str | None = None, saved: str | None = None) -> StoreAddress:
    """Choose the store of a run.

    In this order: ``given``, ``saved``, ``$MLFLOW_TRACKING_URI``, the store that the run used
    before, ``mlflow.db`` in the output folder if there is one, ``mlflow.db`` in the working
    directory.

    An output folder may come from elsewhere, so an address that only the folder names is not
    trusted: a server gets no credentials of the environment unless ``MLFLOW_TRACKING_URI`` names
    the same server, and no database is connected to or created.

    Args:
        given: the user's address: ``tracking.uri`` of the run file that is trained, or an address
            on the command line.
        saved: ``tracking.uri`` of ``run.yaml`` in the output folder; its credentials are hidden.

    Raises:
        BadInput: the address is not usable, its password is unknown, or it must be confirmed.
    """
    environment = os.environ.get("MLFLOW_TRACKING_URI") or None
    uri = given or saved or environment
    if not uri:
        return _default(output_dir)
    if HIDDEN in uri and environment and _bare(environment) == _bare(uri):
        uri = environment
    target = _target(uri, "tracking.uri" if given or saved else "MLFLOW_TRACKING_URI")
    if given or (environment and _server_of(uri) == _server_of(environment)):
        return target
    return _unconfirmed(target, output_dir)


def _default(output_dir: Path) -> StoreAddress:
    """Return the store that the run used before, the folder's own, or MLflow's default."""
    before = ProgressFile(output_dir).store
    if before and not problem_of_uri(before):
        return _unconfirmed(_target(before, str(output_dir / STATE_FILE)), output_dir)
    own = output_dir.resolve() / DATABASE
    return _sqlite(own if own.is_file() else Path.cwd() / DATABASE)


def _unconfirmed(target: StoreAddress, output_dir: Path) -> StoreAddress:
    """Restrict a store that only an output folder names."""
    scheme, path = scheme_of(target.name), target.database
    if scheme in HTTP:
        return replace(target, trusted=False)
    if target.name in OTHERS or scheme in OTHERS:
        return target  # the host is in the user's own settings
    if path is not None and (path.is_file() or _is_default(path, output_dir)):
        return target
    raise BadInput(
        f"{output_dir}: only this folder names the MLflow store {target.name}; if it is yours, "
        f"run: {sync_command(output_dir, target.name)}"
    )


def _is_default(path: Path, output_dir: Path) -> bool:
    """Whether a run that is started in a folder above its output uses this store by default."""
    above = path.parent == Path.cwd() or output_dir.resolve().is_relative_to(path.parent)
    return path.name == DATABASE and path.parent.is_dir() and above


def sync_command(output_dir: Path, uri: str | None = None) -> str:
    """Return the ``promptshard sync`` command for a folder."""
    option = f" --uri {shlex.quote(uri)}" if uri else ""
    return f"promptshard sync {for_shell(output_dir)}{option}"


def install_ui_hint() -> str:
    """Return how to install ``mlflow ui``; "" if it is installed. ``mlflow-skinny`` lacks it."""
    try:
        importlib.metadata.distribution("mlflow")
    except importlib.metadata.PackageNotFoundError:
        return "mlflow ui needs more packages: pip install 'promptshard[ui]'"
    return ""


def for_shell(path: Path) -> str:
    """Quote a path for a shell; relative if it is below the working directory."""
    with contextlib.suppress(ValueError, OSError):
        path = path.relative_to(Path.cwd())
    return shlex.quote(str(path))


def _target(uri: str, setting: str) -> StoreAddress:
    if problem := problem_of_uri(uri):
        raise BadInput(f"{setting}: {problem}")
    scheme = scheme_of(uri)
    if scheme in HTTP:
        return _server(uri)
    if HIDDEN in uri:
        raise BadInput(
            f"{setting}: the password of {uri} is not stored; "
            "give the whole address in MLFLOW_TRACKING_URI"
        )
    if scheme == "sqlite":
        prefix, _, rest = uri.partition(":///")
        path, mark, query = rest.partition("?")
        return _sqlite(Path(unquote(path)).absolute(), prefix, mark + query)
    return StoreAddress(uri=uri, name=_bare(uri), secrets=_secrets(uri))


def _sqlite(path: Path, prefix: str = "sqlite", query: str = "") -> StoreAddress:
    path = Path(os.path.normpath(path))
    name = sqlite_uri(path)
    return StoreAddress(
        uri=prefix + name.removeprefix("sqlite") + query,
        name=name,
        artifacts=(path.parent / ARTIFACTS).as_uri(),
        secrets=_secrets(),
    )


def _server(uri: str) -> StoreAddress:
    parts = urlsplit(uri)
    credentials = {}
    if parts.username and parts.username != HIDDEN:
        credentials["MLFLOW_TRACKING_USERNAME"] = unquote(parts.username)
        credentials["MLFLOW_TRACKING_PASSWORD"] = unquote(parts.password or "")
    for key, value in parse_qsl(parts.query, keep_blank_values=True):
        if key.lower() in _TOKEN_NAMES and value != HIDDEN:
            credentials["MLFLOW_TRACKING_TOKEN"] = value
            # MLflow would prefer a password of the environment to the token.
            credentials = {"MLFLOW_TRACKING_USERNAME": "", **credentials}
    bare = _bare(uri)
    return StoreAddress(uri=bare, name=bare, credentials=credentials, secrets=_secrets(uri))


def _server_of(uri: str) -> tuple[str | int | None, ...]:
    """Return scheme, host and port of a server; the address of another store."""
    if scheme_of(uri) in HTTP:
        parts = urlsplit(uri)
        with contextlib.suppress(ValueError):
            return parts.scheme, parts.hostname, parts.port or _PORTS.get(parts.scheme)
    return (_bare(uri),)


def _bare(uri: str) -> str:
    """Normalize an address and remove its credentials."""
    parts = urlsplit(uri)
    host = parts.netloc.rpartition("@")[2]
    query = [(k, v) for k, v in parse_qsl(parts.query) if k.lower() not in _TOKEN_NAMES]
    bare = urlunsplit((parts.scheme, host, parts.path.rstrip("/"), urlencode(query), ""))
    return redact(bare)


def _secrets(uri: str = "") -> tuple[str, ...]:
    names = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "DATABRICKS_TOKEN")
    values = [value for name in names if is_distinct(value := os.environ.get(name, ""))]
    return (*secrets_of(uri), *values)
