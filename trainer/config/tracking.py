"""Tracking settings of the run file, with checks of the MLflow address. Imports no mlflow."""

from __future__ import annotations

import re
from urllib.parse import quote, urlsplit

from pydantic import Field, field_serializer, field_validator

from trainer.config.types import Section, expand_path
from trainer.runtime.redact import redact

HTTP = ("http", "https")
DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
OTHERS = ("databricks", "databricks-uc")
_NEVER = re.compile(r"[\x00-\x1f\x7f]")
#: Characters that end an address inside a text, also for ``redact``. File names and database
#: options may contain them; servers and passwords may not.
_NO_ADDRESS = re.compile(r"[\s'\"<>]")
#: Addresses in which "$" does not begin a variable.
_REMOTE = re.compile(r"https?://|databricks|\w+(\+\w+)?://[^/]")


class Tracking(Section):
    """Metrics in MLflow and TensorBoard."""

    experiment: str = Field(
        "promptshard", min_length=1, description="name of the MLflow experiment of the run"
    )
    uri: str | None = Field(
        None,
        description="address of the MLflow store\n"
        "http(s)://HOST:PORT, sqlite:///FILE, or a database such as postgresql://USER@HOST/NAME.\n"
        "null: $MLFLOW_TRACKING_URI, or sqlite:///mlflow.db in the working directory",
    )
    register_as: str | None = Field(
        None,
        alias="register",
        description="name of a registered model in MLflow\n"
        "The best prompt of each task by validation becomes a version of a finished run; "
        "`promptshard sync --prompt` registers others. The best version has the alias `best`. "
        "In a run with several tasks, each task has its own model, NAME-TASK. The hand-written "
        "prompts go to MLflow's prompt registry as NAME-hand-written.\n"
        "null: nothing is registered",
    )
    tensorboard: bool = Field(
        False,
        description="also write the metrics to output_dir/tensorboard\n"
        "Needs the extra promptshard[tensorboard].",
    )
    system_metrics: bool = Field(
        True,
        description="record CPU, memory and GPU load of rank 0's node\n"
        "NVIDIA GPUs need the package nvidia-ml-py.",
    )

    @field_validator("register_as")
    @classmethod
    def _legal(cls, value: str | None) -> str | None:
        if value is not None and (problem := problem_of_name(value)):
            raise ValueError(problem)
        return value

    @field_validator("uri")
    @classmethod
    def _expand(cls, value: str | None) -> str | None:
        """Expand variables in the path of a local file; a password may contain a ``$``."""
        if value is None or _REMOTE.match(value):
            return value
        match = re.match(r"(\w+:///)?(.*)", value, re.DOTALL)
        assert match is not None
        return f"{match[1] or ''}{expand_path(match[2])}"

    @field_serializer("uri", when_used="json")
    def _escape(self, value: str | None) -> str | None:
        """Escape ``$``, so that ``_expand`` leaves it unchanged when the file is read again."""
        return value if value is None or _REMOTE.match(value) else value.replace("$", "$$")

    @field_validator("uri")
    @classmethod
    def _usable(cls, value: str | None) -> str | None:
        if value and (problem := problem_of_uri(value)):
            raise ValueError(problem)
        return value


def scheme_of(uri: str) -> str:
    """Return ``postgresql`` for ``postgresql+psycopg2://...``; empty without a scheme."""
    return uri.partition("://")[0].lower().partition("+")[0] if "://" in uri else ""


def problem_of_name(name: str) -> str | None:
    """Return why MLflow cannot register models and prompts under a name; None if it can."""
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}", name):
        return None
    return f"{name[:50]!r} is not a name for a model; use letters, digits, and any of _ . -"


def problem_of_uri(uri: str) -> str | None:
    """Return why MLflow cannot use an address as tracking store, and the remedy; None if valid."""
    shown, scheme = repr(redact(uri)), scheme_of(uri)
    address = "" if scheme == "sqlite" else uri if scheme in HTTP else uri.rpartition("@")[0]
    if bad := _NEVER.search(uri) or _NO_ADDRESS.search(address):
        # The message omits the address: a password with such a character cannot be redacted.
        return f"holds {bad[0]!r}, which no address may; write it as {quote(bad[0])}"
    if uri in OTHERS or scheme in OTHERS:
        return None
    if scheme in HTTP:
        try:
            parts = urlsplit(uri)
            host, _ = parts.hostname, parts.port
        except ValueError as error:
            return f"{shown} is not a valid address ({error}); use http://HOST:PORT"
        return None if host else f"{shown} has no host; use http://HOST:PORT"
    if scheme == "sqlite":
        path = uri.partition(":///")[2].partition("?")[0]
        if not path or path == ":memory:":
            return f"{shown} names no file; use sqlite:///PATH/mlflow.db"
        return None
    if scheme in DATABASES:
        return None
    if scheme in ("", "file"):
        return (
            f"{shown} is a folder, which MLflow no longer writes to; use sqlite:///PATH/mlflow.db, "
            "or null for mlflow.db in the working directory"
        )
    return (
        f"{shown} has an unknown scheme {scheme!r}; use http(s)://, sqlite:///, postgresql://, "
        "mysql://, mssql:// or databricks"
    )
