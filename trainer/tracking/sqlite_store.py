"""New SQLite stores: made in a temporary folder, published whole.

MLflow creates the tables of a new SQLite store in about fifty migrations. A process that ends in
the middle leaves a file that MLflow never opens again, and two that begin at once disturb each
other.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import shutil
import sqlite3
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from trainer.runtime.errors import BadInput

logger = logging.getLogger(__name__)
#: How long a store that is incomplete may not have changed before it counts as abandoned.
ABANDONED_SECONDS = 10.0
BUSY_SECONDS = 20.0


def sqlite_uri(path: Path) -> str:
    """The address of an SQLite file: SQLAlchemy decodes its path, and a "?" begins its query."""
    return "sqlite:///" + str(path).replace("%", "%25").replace("?", "%3F")


def prepare(path: Path, artifacts: str) -> None:
    """Make the SQLite file of a store if there is none that MLflow can open.

    A file that MLflow has begun and not completed, and that has no runs, is renamed first.

    Args:
        artifacts: address of the folder for files of experiments that name no other.

    Raises:
        BadInput: the file is not an MLflow store.
        OSError: the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.parent):
        if path.exists() and path.stat().st_size and _is_abandoned(path):
            _set_aside(path)
        if not path.exists() or not path.stat().st_size:
            _make(path, artifacts)


def _is_abandoned(path: Path) -> bool:
    """Whether the making of a store was interrupted; waits for one that is still being made."""
    from mlflow.store.db_migrations import __path__ as folders  # holds alembic's scripts

    newest = _newest_schema(next(iter(folders)))
    while _is_incomplete(path, newest):
        left = path.stat().st_mtime + ABANDONED_SECONDS - time.time()
        if left <= 0:
            return True
        time.sleep(min(left, 1.0))
    return False


def _newest_schema(scripts: str) -> str | None:
    from alembic.script import ScriptDirectory

    return ScriptDirectory(scripts).get_current_head()


def _is_incomplete(path: Path, newest: str | None) -> bool:
    """Whether a store has an older schema than MLflow's and nothing that could be lost.

    Raises:
        BadInput: if it is not an MLflow store.
    """
    remedy = "move it away, or give another file in tracking.uri (sqlite:///PATH/mlflow.db)"
    try:
        with contextlib.closing(sqlite3.connect(path, timeout=BUSY_SECONDS)) as store:
            rows = store.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
            tables = {name for (name,) in rows}
            counts = {
                table: store.execute(f"SELECT COUNT(*) FROM {table}").fetchone()[0]
                for table in tables & {"runs", "experiments"}
            }
            schema = None
            if "alembic_version" in tables:
                schema = store.execute("SELECT version_num FROM alembic_version").fetchone()
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError) and "locked" in str(error):
            raise
        raise BadInput(f"{path} cannot be read as an SQLite store ({error}); {remedy}") from None
    if tables and not tables & {"experiments", "alembic_version"}:
        raise BadInput(f"{path} is a database of another program; {remedy}")
    used = counts.get("runs", 0) > 0 or counts.get("experiments", 0) > 1
    return not used and schema != (newest,)


def _set_aside(path: Path) -> None:
    number = 1
    while (aside := path.with_name(f"{path.name}.incomplete-{number}")).exists():
        number += 1
    for ending in ("-journal", "-wal", "-shm", ""):  # a new store must not meet an old journal
        with contextlib.suppress(FileNotFoundError):
            os.rename(f"{path}{ending}", f"{aside}{ending}")
    logger.warning("%s was incomplete and had no runs; moved to %s", path, aside)


def _make(path: Path, artifacts: str) -> None:
    """Let MLflow make the store elsewhere, then give it its name unless another process was first.

    The temporary folder is also on a local disk, where the migrations are fast.
    """
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    with tempfile.TemporaryDirectory(prefix="promptshard-mlflow-") as folder:
        made = Path(folder) / path.name
        store = SqlAlchemyStore(sqlite_uri(made), artifacts)
        store.engine.dispose()
        ready = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            with made.open("rb") as source, ready.open("xb") as copy:
                shutil.copyfileobj(source, copy)
                copy.flush()
                os.fsync(copy.fileno())
            _publish(ready, path)
        finally:
            ready.unlink(missing_ok=True)


def _publish(ready: Path, path: Path) -> None:
    if path.exists() and not path.stat().st_size:
        path.unlink()  # touched by somebody: MLflow takes an empty file for a new store too
    try:
        os.link(ready, path)
    except FileExistsError:
        return
    except OSError:  # a file system without hard links
        if not path.exists():
            os.rename(ready, path)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one process at a time look at and make stores here, where the file system has locks.

    Without locks two processes may both make a store; one of them is published.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
