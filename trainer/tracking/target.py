"""Which MLflow store a run goes to, with the credentials kept apart from the address."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit, urlunsplit

from trainer.errors import BadInput
from trainer.redact import HIDDEN, redact, secrets_of

HTTP = ("http", "https")
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
OTHERS = ("databricks", "databricks-uc")
_TOKEN_NAMES = ("token", "access_token")


@dataclass(frozen=True)
class Target:
    """An MLflow store."""

    uri: str = field(repr=False)  #: what MLflow is given; of a server, without credentials
    name: str  #: the same without any secret: may be shown and written
    artifacts: str | None  #: where artifacts go; None: the store decides
    credentials: dict[str, str] = field(default_factory=dict, repr=False)  #: environment to set
    secrets: tuple[str, ...] = field(default=(), repr=False)

    def apply(self, environment: MutableMapping[str, str]) -> None:
        """Hand the credentials to MLflow the way its documentation says, by environment."""
        environment.update(self.credentials)
        environment["MLFLOW_TRACKING_URI"] = self.uri

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """``apply`` to this process, and take it back."""
        before = dict(os.environ)
        self.apply(os.environ)
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(before)

    def hide(self, text: str) -> str:
        return redact(text, self.secrets)


def check_uri(uri: str | None) -> None:
    """Refuse a ``tracking.uri`` that MLflow cannot use.

    Raises:
        BadInput: a folder or ``file:`` store (MLflow no longer writes them), an unknown scheme, or
            a server's address without a host.
    """
    if not uri:
        return
    shown = redact(uri)
    scheme = uri.partition("://")[0].lower().partition("+")[0] if "://" in uri else ""
    if uri in OTHERS or scheme in OTHERS or scheme in DATABASES:
        return
    if scheme in HTTP:
        if not urlsplit(uri).hostname:
            raise BadInput(f"tracking.uri: {shown!r} names no host; write http://HOST:PORT")
        return
    if scheme in ("", "file"):
        raise BadInput(
            f"tracking.uri: {shown!r} is a folder, which MLflow no longer writes to; "
            "use sqlite:///PATH/mlflow.db, or null for one in the output folder"
        )
    raise BadInput(
        f"tracking.uri: {shown!r}: unknown scheme {scheme!r}; use http(s)://, sqlite:///, "
        "postgresql://, mysql://, mssql:// or databricks"
    )


def resolve(output_dir: Path, uri: str | None) -> Target:
    """``uri`` of the run file, else ``$MLFLOW_TRACKING_URI``, else SQLite in ``output_dir``.

    The copy of the run file in the output folder has its credentials hidden. Where that copy is all
    there is, a server's credentials come from ``MLFLOW_TRACKING_USERNAME`` and
    ``MLFLOW_TRACKING_PASSWORD`` (or ``_TOKEN``), or from ``MLFLOW_TRACKING_URI``.

    Raises:
        BadInput: the address cannot be used, or a database's password is not known.
    """
    from_environment = os.environ.get("MLFLOW_TRACKING_URI") or None
    if uri and HIDDEN in uri and from_environment and _bare(from_environment) == _bare(uri):
        uri = from_environment
    uri = uri or from_environment
    if not uri:
        return _sqlite(output_dir.resolve() / "mlflow.db")
    check_uri(uri)
    scheme = uri.partition("://")[0].lower()
    if scheme in HTTP:
        return _server(uri)
    if HIDDEN in uri:
        raise BadInput(
            f"tracking.uri: the password of {uri} is not stored; "
            "give the whole address in MLFLOW_TRACKING_URI"
        )
    if scheme.startswith("sqlite"):
        path = uri.partition(":///")[2].partition("?")[0]
        return _sqlite(Path(path).resolve(), uri)
    secrets = (*secrets_of(uri), *_environment_secrets())
    return Target(uri=uri, name=_bare(uri), artifacts=None, secrets=secrets)


def _sqlite(path: Path, uri: str | None = None) -> Target:
    # Beside the database, not in the working folder, which is MLflow's default.
    return Target(
        uri=uri or f"sqlite:///{path}",
        name=f"sqlite:///{path}",
        artifacts=(path.parent / "mlartifacts").as_uri(),
        secrets=tuple(_environment_secrets()),
    )


def _server(uri: str) -> Target:
    parts = urlsplit(uri)
    credentials = {}
    if parts.username and parts.username != HIDDEN:
        credentials["MLFLOW_TRACKING_USERNAME"] = unquote(parts.username)
        credentials["MLFLOW_TRACKING_PASSWORD"] = unquote(parts.password or "")
    query = parse_qsl(parts.query, keep_blank_values=True)
    for key, value in query:
        if key.lower() in _TOKEN_NAMES and value != HIDDEN:
            credentials["MLFLOW_TRACKING_TOKEN"] = value
    bare = _bare(uri)
    secrets = (*secrets_of(uri), *_environment_secrets())
    return Target(uri=bare, name=bare, artifacts=None, credentials=credentials, secrets=secrets)


def _bare(uri: str) -> str:
    """The address alone: what two spellings of one store have in common."""
    parts = urlsplit(uri)
    host = parts.netloc.rpartition("@")[2]
    query = [(k, v) for k, v in parse_qsl(parts.query) if k.lower() not in _TOKEN_NAMES]
    bare = urlunsplit((parts.scheme, host, parts.path.rstrip("/"), urlencode(query), ""))
    return redact(bare)


def _environment_secrets() -> list[str]:
    names = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "DATABRICKS_TOKEN")
    return [value for name in names if len(value := os.environ.get(name, "")) >= 4]
