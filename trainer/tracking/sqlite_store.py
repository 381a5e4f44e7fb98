"""Create new SQLite stores atomically, in a temporary folder.

MLflow creates the tables of a new SQLite store in about fifty migrations. If a process is killed
meanwhile, MLflow never opens the file again, and two processes that start at once corrupt it.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import sqlite3
import tempfile
import time
import uuid
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from trainer.runtime import atomic_io
from trainer.runtime.errors import BadInput

logger = logging.getLogger(__name__)
#: An incomplete store that has not changed for so long counts as abandoned.
ABANDONED_SECONDS = 10.0
BUSY_SECONDS = 20.0


def sqlite_uri(path: Path) -> str:
    """Return the address of an SQLite file: SQLAlchemy decodes "%", and "?" starts a query."""
    return "sqlite:///" + str(path).replace("%", "%25").replace("?", "%3F")


def prepare(path: Path, artifacts: str) -> None:
    """Create the SQLite file of a store unless there is one that MLflow can open.

    A file that is incomplete and has no runs is renamed first.

    Args:
        artifacts: address of the default artifact folder.

    Raises:
        BadInput: the file is not an MLflow store.
        OSError: the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.parent):
        if path.exists() and path.stat().st_size and _is_abandoned(path):
            _rename_incomplete(path)
        if not path.exists() or not path.stat().st_size:
            _create(path, artifacts)


def _is_abandoned(path: Path) -> bool:
    """Whether the creation of a store was interrupted; waits for one that is being created."""
    from alembic.script import ScriptDirectory
    from mlflow.store.db_migrations import __path__ as folders

    newest = ScriptDirectory(next(iter(folders))).get_current_head()
    while _is_incomplete(path, newest):
        left = path.stat().st_mtime + ABANDONED_SECONDS - time.time()
        if left <= 0:
            return True
        time.sleep(min(left, 1.0))
    return False


def _is_incomplete(path: Path, newest: str | None) -> bool:
    """Whether an MLflow store has an older schema than MLflow's and no data that could be lost."""
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


def _rename_incomplete(path: Path) -> None:
    names = (path.with_name(f"{path.name}.incomplete-{number}") for number in count(1))
    renamed = next(name for name in names if not name.exists())
    for suffix in ("-journal", "-wal", "-shm", ""):  # SQLite would apply an old journal
        with contextlib.suppress(FileNotFoundError):
            os.rename(f"{path}{suffix}", f"{renamed}{suffix}")
    logger.warning("%s was incomplete and had no runs; moved to %s", path, renamed)


def _create(path: Path, artifacts: str) -> None:
    """Create a store in a temporary folder, then publish it unless another process was first.

    The migrations are also faster there, on a local disk.
    """
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    with tempfile.TemporaryDirectory(prefix="promptshard-mlflow-") as folder:
        temporary = Path(folder) / path.name
        store = SqlAlchemyStore(sqlite_uri(temporary), artifacts)
        store.engine.dispose()
        ready = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
        try:
            atomic_io.write(ready, temporary.read_bytes(), durable=True)
            _publish(ready, path)
        finally:
            ready.unlink(missing_ok=True)


def _publish(ready: Path, path: Path) -> None:
    if path.exists() and not path.stat().st_size:
        path.unlink()  # MLflow treats an empty file as a new store too
    try:
        os.link(ready, path)
    except FileExistsError:
        return
    except OSError:  # no hard links on this file system
        if not path.exists():
            os.rename(ready, path)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Allow one process at a time to check and create stores in a folder.

    On a file system without locks, two processes may both create a store; one is published.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
