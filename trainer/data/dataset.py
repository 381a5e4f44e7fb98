"""Rows of a split: the columns that a task uses, as memory-mapped Arrow. Imports no torch.

Rows stay on disk. If only some are selected, the selection takes 8 bytes of memory per row.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from trainer.config import Task, template_fields
from trainer.data.column_parsers import content_of
from trainer.data.ingest import HASH, IngestedFile
from trainer.data.row_hashing import Hashes, Index

_BATCH_ROWS = 1000


@dataclass(frozen=True)
class MixtureComponent:
    """A range of rows that is mixed with others by weight: ``rows[start:stop]``.

    Without weights (``None`` for all components of a split, never for some), an epoch reads every
    row once, in one shuffled order, as if there were one component.

    With weights, an epoch also reads as many rows as the split has, N. Component s contributes n_s
    of them: N * weight_s / sum of weights, rounded by largest remainder (ties: the earlier
    component), so that the n_s sum to N. Each component is read in passes: pass k is its rows in an
    order that is a pure function of (seed, s, k). Epoch e takes places e * n_s to (e + 1) * n_s of
    the concatenated passes, and shuffles the rows of all components together by (seed, e). So
    shares are exact in every epoch, a component's row is not repeated before all its other rows
    were read, and an epoch is a pure function of (seed, epoch). This is the mixing by rate of T5
    (arXiv 1910.10683, section 3.5.2) with exact shares instead of random draws.

    Attributes:
        start, stop: rows of the split; components are in order and without gaps.
        weight: positive, or None.
    """

    start: int
    stop: int
    weight: float | None = None


class RowDataset:
    """Checked rows of one split. ``rows[i]`` has the columns that the task uses.

    Values are those of the file: a text that looks like a date or a number stays text. JSON text
    that stands for a list (test calls, dialogues, token ids; in csv) is parsed; the labels of a
    multi-label row are joined to the text to predict.

    Args:
        components: ranges of all rows of the files.
        index: ascending numbers of the selected rows; None: all rows.
        selection: description of the selection, for the digest.

    Attributes:
        path: name of the files in messages.
        columns: all columns of the first file.
        digest: hash of the files' bytes, the weights and the selection; for all rows of one file,
            its SHA-256 in hex.
        components: ranges of the selected rows that are mixed by weight.
    """

    def __init__(
        self,
        path: str,
        files: Sequence[IngestedFile],
        components: Sequence[MixtureComponent],
        index: Index | None = None,
        selection: str = "",
    ) -> None:
        self.path = path
        self.columns = files[0].columns
        self._files = tuple(files)
        self._file_starts = list(accumulate(map(len, files), initial=0))
        self._batches = [(file, batch) for file in files for batch in file.batches]
        self._batch_starts = list(accumulate((b.num_rows for _, b in self._batches), initial=0))
        self._index = index
        self._all_components = tuple(components)
        self._selection = selection
        self.components = self._all_components
        if index is not None:
            edges = [int(np.searchsorted(index, c.start)) for c in components] + [len(index)]
            self.components = tuple(
                MixtureComponent(start, stop, component.weight)
                for component, (start, stop) in zip(components, pairwise(edges), strict=True)
            )
        self.digest = self._digest()

    @property
    def num_files(self) -> int:
        return len(self._files)

    def __len__(self) -> int:
        return self._file_starts[-1] if self._index is None else len(self._index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        file, batch, at, _ = self._locate(index)
        return next(file.values(batch.slice(at, 1)))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for file, batch in self._selected_batches():
            for start in range(0, batch.num_rows, _BATCH_ROWS):
                yield from file.values(batch.slice(start, _BATCH_ROWS))

    def where(self, index: int) -> str:
        """Return ``FILE:LINE`` of a row in jsonl and txt, else ``FILE: row N``; from 1."""
        file, batch, at, row = self._locate(index)
        return file.where(batch, at, row)

    @property
    def numbers(self) -> Index:
        """Number of each row among all rows of the files."""
        return np.arange(len(self)) if self._index is None else self._index

    def hashes(self) -> Hashes:
        """64-bit hash of the content of each row."""
        parts = [batch.column(HASH).to_numpy() for _, batch in self._selected_batches()]
        return np.concatenate([np.zeros(0, np.uint64), *parts])

    def take(self, index: Index, selection: str) -> RowDataset:
        """Select rows by their ascending indices; ``selection`` describes them in the digest."""
        index = index if self._index is None else self._index[index]
        selection = f"{self._selection}, {selection}"
        return RowDataset(self.path, self._files, self._all_components, index, selection)

    def _locate(self, index: int) -> tuple[IngestedFile, Any, int, int]:
        """Return (file, batch, index in the batch, index in the file) of a row."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)} in {self.path}")
        row = range(len(self))[index]
        row = row if self._index is None else int(self._index[row])
        number = bisect_right(self._batch_starts, row) - 1
        file, batch = self._batches[number]
        first = self._file_starts[bisect_right(self._file_starts, row) - 1]
        return file, batch, row - self._batch_starts[number], row - first

    def _selected_batches(self) -> Iterator[tuple[IngestedFile, Any]]:
        for (file, batch), start in zip(self._batches, self._batch_starts, strict=False):
            if self._index is None:
                yield file, batch
            else:
                low, high = np.searchsorted(self._index, [start, start + batch.num_rows])
                yield file, batch.take(self._index[low:high] - start)

    def _digest(self) -> str:
        weights = [component.weight for component in self._all_components]
        if len(self._files) == 1 and not any(weights) and not self._selection:
            return self._files[0].digest
        edges = [(c.start, c.stop) for c in self._all_components] if any(weights) else []
        identity = [[file.digest for file in self._files], weights, edges, self._selection]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


class ChangedRows(RowDataset):
    """Rows whose values are computed from those of other rows; places and hashes stay the same.

    Args:
        change: returns the new row, from the index and the row.
        description: of the change, for the digest.
    """

    def __init__(
        self,
        rows: RowDataset,
        change: Callable[[int, dict[str, Any]], dict[str, Any]],
        description: str,
    ) -> None:
        vars(self).update(vars(rows))
        self._rows, self._change = rows, change
        self.digest = hashlib.sha256(json.dumps([rows.digest, description]).encode()).hexdigest()

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._change(range(len(self))[index], self._rows[index])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for index, row in enumerate(self._rows):
            yield self._change(index, row)


def gold_target(row: dict[str, Any], task: Task) -> str:
    """Return the choice of a row: the value of the target's only column, or the last answer."""
    if task.messages is not None:
        return content_of(row[task.messages][-1])
    return str(row[template_fields(task.target)[0]])


def gold_choices(rows: RowDataset, task: Task) -> list[int]:
    """Return the index in ``task.choices`` of every row's target."""
    assert task.choices is not None
    index = {choice: i for i, choice in enumerate(task.choices)}
    return [index[gold_target(row, task)] for row in rows]
