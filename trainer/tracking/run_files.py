"""Read the files that a run has written into its output folder.

The folder may come from another machine or user: nothing is read through a symlink, so that no
other file of this machine is uploaded, and damaged files count as empty.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from trainer import config
from trainer.config import RunConfig, yaml_source
from trainer.config.tracking import Tracking
from trainer.runtime.errors import BadInput
from trainer.runtime.json_file import read_json
from trainer.tracking.metrics_log import METRICS_FILE, Line, read_lines


class RunFiles:
    """Reads a run's output folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problem: str | None = None  #: why ``run.yaml`` does not load; set by ``settings``

    def file(self, name: str) -> Path | None:
        """Return the regular file ``name`` ("a/b"), unless it or one of its folders is a symlink.

        The name may come from other files of the folder, so it is not trusted.
        """
        path = self.path
        for part in name.split("/"):
            path = path / part
            if part in ("", ".", "..") or path.is_symlink():
                return None
        return path if path.is_file() else None

    def lines(self, name: str, offset: int = 0) -> Iterator[tuple[Line | None, int]]:
        """As ``read_lines``, for a file of the folder."""
        path = self.file(name)
        return iter(()) if path is None else read_lines(path, offset)

    def json(self, name: str) -> Any:
        """Parse a JSON file of the folder; None if it is missing or damaged."""
        try:
            path = self.file(name)
            return None if path is None else read_json(path)
        except BadInput:
            return None

    @property
    def settings(self) -> dict[str, Any]:
        """The run file with all defaults; parsed again only if the file has changed.

        A run file that does not load (edited, or of another version) is returned as written.
        """
        try:
            path = self.file("run.yaml")
            if path is None:
                return {}
            stat = path.stat()
        except OSError:
            return {}
        version = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
        settings, self.problem = _read_settings(path, version)
        return settings

    @property
    def tracking(self) -> Tracking:
        """The ``tracking`` section of the run file; ``BadInput`` if it is invalid."""
        section = mapping(self.settings.get("tracking"))
        try:
            return Tracking.model_validate(section)
        except ValidationError as error:
            problem = error.errors()[0]
            name = ".".join(map(str, ("tracking", *problem["loc"])))
            raise BadInput(f"{self.path / 'run.yaml'}: {name}: {problem['msg']}") from None

    @property
    def prompts(self) -> list[dict[str, Any]]:
        return named(self.settings.get("prompts"))

    @property
    def start_ms(self) -> int | None:
        """When the run first started, in Unix milliseconds; a resumed run writes run.yaml again."""
        lines = (line for line, _ in self.lines(METRICS_FILE) if line is not None)
        first = next(lines, None)
        times = [first.time] if first is not None else []
        with contextlib.suppress(OSError):
            times.append((self.path / "run.yaml").stat().st_mtime)
        return int(min(times) * 1000) if times else None

    def summary(self) -> dict[str, Any]:
        return mapping(self.json("summary.json"))


@functools.lru_cache(maxsize=4)
def _read_settings(path: Path, version: object) -> tuple[dict[str, Any], str | None]:
    """Return the settings of a run file, and why it does not load; ``version`` is for the cache."""
    try:
        return _resolved(config.load(path)), None
    except BadInput as error:
        return yaml_source.saved(path), error.problems[0]


def _resolved(run: RunConfig) -> dict[str, Any]:
    """Dump a run file, with the values that prompts inherit from the run."""
    settings = run.model_dump(mode="json")
    for prompt, values in zip(run.prompts, settings["prompts"], strict=True):
        values |= {
            "encoder": prompt.encoder_name,
            "seed": run.prompt_seed(prompt),
            "data_seed": run.data_seed(prompt),
            "steps": run.prompt_steps(prompt),
        }
    return settings


def mapping(value: Any) -> dict[str, Any]:
    """Return ``value`` if it is a mapping, else an empty one."""
    return value if isinstance(value, dict) else {}


def mappings(value: Any) -> list[dict[str, Any]]:
    """Return the mappings of a list; other items are left out."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def named(value: Any) -> list[dict[str, Any]]:
    """Return the mappings of a list that have a name."""
    return [item for item in mappings(value) if isinstance(item.get("name"), str)]
