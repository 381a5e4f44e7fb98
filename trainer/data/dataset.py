"""Rows of a split: columns that a task uses, held as memory-mapped Arrow. Imports no torch.

What grows with the number of rows is on disk.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from trainer.config import Task, template_fields
from trainer.data.disk_arrays import DiskArrays, chunks
from trainer.data.ingest import IngestedFile
from trainer.data.row_hashing import Hashes, Index

_BATCH = 1000


@dataclass(frozen=True)
class MixtureComponent:
    """A range of rows that are mixed with others by weight: ``rows[start:stop]``.

    Without weights (``None`` for all sources of a split, never for some) an epoch reads every row
    once, in one shuffled order, as if there were one source.

    With weights an epoch still reads N rows, as many as the split has. Source s gives n_s of them,
    N * weight_s / sum of weights, rounded by largest remainder (ties: the earlier source), so that
    the n_s sum to N. Each source is read in passes of its own: pass k is its rows in an order that
    is a pure function of (seed, s, k), and the passes are laid end to end. Epoch e takes the places
    e * n_s to (e + 1) * n_s of that endless sequence, and shuffles the rows of all sources together
    by (seed, e). So the shares are exact in every epoch, no row of a source is read again before
    all others of that source were, and an epoch is a pure function of (seed, epoch). Small sources
    with large weights are repeated within an epoch, large ones with small weights take several
    epochs to be read once; with weights in proportion to their rows every row is read once.
    (T5's mixing by rate, arXiv 1910.10683 section 3.5.2, with exact shares in place of draws.)

    Attributes:
        start, stop: rows of the split; sources are in order and without gaps.
        weight: positive, or None.
    """

    start: int
    stop: int
    weight: float | None = None


class RowDataset:
    """Checked rows of one split. ``rows[i]`` holds the columns that the task uses.

    Values are those of the file: nothing is guessed from text that looks like a date or a number.
    Where csv has JSON text for a list (test calls, dialogues, token ids) it is that list; the
    labels of a multi-label row are the text to write.

    Attributes:
        path: the files, as messages name them all together.
        columns: all columns, of the first file.
        digest: of the files' bytes, the weights and which rows were taken; of one whole file, its
            SHA-256 in hex.
        sources: ranges of rows that are mixed by weight.
    """

    def __init__(
        self,
        path: str,
        parts: Sequence[IngestedFile],
        sources: Sequence[MixtureComponent],
        index: Index | None = None,
        chosen: str = "",
    ) -> None:
        self.path = path
        self.columns = parts[0].columns
        self._parts = tuple(parts)
        self._first = list(accumulate(map(len, parts), initial=0))
        self._batches = [(part, batch) for part in parts for batch in part.batches]
        self._starts = list(accumulate((b.num_rows for _, b in self._batches), initial=0))
        self._index = index
        self._all = tuple(sources)
        self._chosen = chosen
        self.sources = self._within(self._all, index)
        self.digest = self._digest()

    @property
    def num_files(self) -> int:
        return len(self._parts)

    def __len__(self) -> int:
        return self._first[-1] if self._index is None else len(self._index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        part, batch, at, _ = self._find(index)
        return next(part.values(batch.slice(at, 1)))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number, (part, batch) in enumerate(self._batches):
            taken = self._taken(batch, self._starts[number])
            for start in range(0, taken.num_rows, _BATCH):
                yield from part.values(taken.slice(start, _BATCH))

    def where(self, index: int) -> str:
        """``FILE:LINE`` of a row in jsonl and txt, else ``FILE: row N``; both count from 1."""
        part, batch, at, row = self._find(index)
        return part.where(batch, at, row)

    def numbers(self, rows: slice) -> Index:
        """Numbers of some rows among all rows of the files."""
        return np.arange(rows.start, rows.stop) if self._index is None else self._index[rows]

    def hashes(self) -> Iterator[Hashes]:
        """64 bits of the content of every row, in order, a piece at a time."""
        for rows in chunks(len(self)):
            numbers = self.numbers(rows)
            found = np.zeros(len(numbers), np.uint64)
            for part, first, stop in zip(self._parts, self._first, self._first[1:], strict=False):
                inside = (numbers >= first) & (numbers < stop)
                found[inside] = part.hashes[numbers[inside] - first]
            yield found

    def take(self, index: Index, chosen: str) -> RowDataset:
        """Some of these rows, by their ascending numbers; ``chosen`` says which, for the digest."""
        if self._index is not None:
            spilled = DiskArrays("int64")
            for part in chunks(len(index)):
                spilled.add(self._index[index[part]])
            index = spilled.array()
        return RowDataset(self.path, self._parts, self._all, index, f"{self._chosen}, {chosen}")

    def _find(self, index: int) -> tuple[IngestedFile, Any, int, int]:
        """(part, batch, number in the batch, number in the file) of a row."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)} in {self.path}")
        row = range(len(self))[index]
        row = row if self._index is None else int(self._index[row])
        number = bisect_right(self._starts, row) - 1
        part, batch = self._batches[number]
        first = self._first[bisect_right(self._first, row) - 1]
        return part, batch, row - self._starts[number], row - first

    def _taken(self, batch: Any, start: int) -> Any:
        if self._index is None:
            return batch
        low, high = np.searchsorted(self._index, [start, start + batch.num_rows])
        return batch.take(self._index[low:high] - start)

    @staticmethod
    def _within(
        sources: Sequence[MixtureComponent], index: Index | None
    ) -> tuple[MixtureComponent, ...]:
        if index is None:
            return tuple(sources)
        edges = [int(np.searchsorted(index, s.start)) for s in sources] + [len(index)]
        return tuple(
            MixtureComponent(start, stop, source.weight)
            for source, start, stop in zip(sources, edges, edges[1:], strict=False)
        )

    def _digest(self) -> str:
        weights = [source.weight for source in self._all]
        if len(self._parts) == 1 and not any(weights) and not self._chosen:
            return self._parts[0].digest
        edges = [(source.start, source.stop) for source in self._all] if any(weights) else []
        named = [[part.digest for part in self._parts], weights, edges, self._chosen]
        return hashlib.sha256(json.dumps(named).encode()).hexdigest()


def gold_target(row: dict[str, Any], task: Task) -> str:
    """The value of a row that ``task.choices`` lists: the target's one column, as text."""
    return str(row[template_fields(task.target)[0]])
