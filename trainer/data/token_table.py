"""Tokenized rows as flat arrays, in memory or memory-mapped. Imports no torch.

A row of Python objects takes about 3 kB, so five million rows fill the memory of a node. In a
table, a row is its int32 ids and a few offsets. Ranks that map the same files share the pages.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

#: Version of the file format of a table's folder.
FORMAT = 2
_CHUNK = 1 << 24
#: Name, type and columns of a table's files, in the order of the arguments of ``TokenTable``.
_ARRAYS: tuple[tuple[str, Any, int | None], ...] = (
    ("ids", np.int32, None),
    ("offsets", np.int64, None),
    ("spans", np.int32, 2),
    ("span_offsets", np.int64, None),
    ("branches", np.int32, 2),
    ("branch_offsets", np.int64, None),
    ("rows", np.int64, None),
    ("places", np.int32, 2),
)


@dataclass(frozen=True)
class Example:
    """One tokenized row: a text, and other continuations of its beginning.

    Most rows are one text. If a chat template rewrites earlier turns of a dialogue, generation
    reads other tokens before an earlier turn than before the last one. Then the row is a tree: the
    trunk is the dialogue up to its last turn, and each branch is the rest of the dialogue up to an
    earlier turn, after the tokens that both have in common.

    Attributes:
        input_ids: input, target, EOS of the trunk, then the tokens of each branch; no virtual
            tokens.
        label_spans: (start, stop) of the tokens that are labels, ascending and disjoint: one for a
            target, or one per learned turn of a dialogue.
        row: index in its ``RowDataset``.
        prompt_at: index of the token before which the virtual tokens are inserted.
        prompt_end: number of leading tokens in the prompt's segment, at least ``prompt_at``. Rows
            with the same leading tokens share this segment in a packed batch.
        branches: (start, shared) of each branch: it begins at ``start`` and continues the first
            ``shared`` tokens of the trunk.
    """

    input_ids: tuple[int, ...]
    label_spans: tuple[tuple[int, int], ...]
    row: int
    prompt_at: int = 0
    prompt_end: int = 0
    branches: tuple[tuple[int, int], ...] = ()

    @classmethod
    def with_target(cls, input_ids: tuple[int, ...], target_start: int, row: int) -> Example:
        """Create an example whose labels are all tokens from ``target_start`` on."""
        return cls(input_ids, ((target_start, len(input_ids)),), row)

    @property
    def target_start(self) -> int:
        """Index of the first label."""
        return self.label_spans[0][0]

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @property
    def num_labels(self) -> int:
        return sum(stop - start for start, stop in self.label_spans)

    @property
    def trunk_length(self) -> int:
        """Number of tokens of the trunk; without branches, of the row."""
        return self.branches[0][0] if self.branches else len(self.input_ids)

    @property
    def last_target(self) -> tuple[int, int]:
        """(start, stop) of the last labels of the trunk: the target, or the last learned turn."""
        return [span for span in self.label_spans if span[1] <= self.trunk_length][-1]

    def from_place(self) -> Example:
        """Return the row from the place of the virtual tokens on; the prompt has the rest."""
        at = self.prompt_at
        assert at <= self.target_start, "the virtual tokens precede all learned turns"
        return Example(
            self.input_ids[at:],
            tuple((start - at, stop - at) for start, stop in self.label_spans),
            self.row,
            0,
            self.prompt_end - at,
            tuple((start - at, shared - at) for start, shared in self.branches),
        )

    def linear(self) -> list[Example]:
        """Return every text of the row separately, in the order of the turns they end with.

        Each label is in the first text that contains it.
        """
        if not self.branches:
            return [self]
        trunk = [span for span in self.label_spans if span[1] <= self.trunk_length]
        stops = [*(start for start, _ in self.branches[1:]), len(self.input_ids)]
        texts, done, place = list[Example](), 0, (self.prompt_at, self.prompt_end)
        for (first, shared), end in zip(self.branches, stops, strict=True):
            own = [(a, b) for a, b in self.label_spans if first <= a < end]
            spans = _within(trunk, done, shared)
            spans += [(a - first + shared, b - first + shared) for a, b in own]
            ids = self.input_ids[:shared] + self.input_ids[first:end]
            texts.append(Example(ids, _joined(spans), self.row, *place))
            done = max(done, shared)
        ids, rest = self.input_ids[: self.trunk_length], _within(trunk, done, self.trunk_length)
        return [*texts, Example(ids, tuple(rest), self.row, *place)]


def _within(spans: Sequence[tuple[int, int]], start: int, stop: int) -> list[tuple[int, int]]:
    """Return the parts of the spans from ``start`` to ``stop``."""
    return [(max(a, start), min(b, stop)) for a, b in spans if b > start and a < stop]


def _joined(spans: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Join adjacent spans."""
    joined: list[tuple[int, int]] = []
    for start, stop in spans:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return tuple(joined)


@dataclass(frozen=True)
class TokenBlock:
    """R consecutive examples, concatenated: T tokens, S label spans, B branches.

    Attributes:
        ids_T: int32.
        lengths_R: tokens of each example.
        spans_S2: (start, stop) within the example.
        span_counts_R: spans of each example.
        branches_B2: (start, shared tokens) of each branch.
        branch_counts_R: branches of each example.
        rows_R: index of each example in the ``RowDataset``.
        places_R2: ``prompt_at`` and ``prompt_end`` of each example.
    """

    ids_T: NDArray[np.int32]
    lengths_R: NDArray[np.int64]
    spans_S2: NDArray[np.int32]
    span_counts_R: NDArray[np.int64]
    branches_B2: NDArray[np.int32]
    branch_counts_R: NDArray[np.int64]
    rows_R: NDArray[np.int64]
    places_R2: NDArray[np.int32]

    @classmethod
    def of(cls, examples: Sequence[Example]) -> TokenBlock:
        spans = [span for example in examples for span in example.label_spans]
        return cls(
            np.fromiter((i for e in examples for i in e.input_ids), np.int32),
            np.array([e.num_tokens for e in examples], np.int64),
            np.array(spans, np.int32).reshape(-1, 2),
            np.array([len(e.label_spans) for e in examples], np.int64),
            np.array([b for e in examples for b in e.branches], np.int32).reshape(-1, 2),
            np.array([len(e.branches) for e in examples], np.int64),
            np.array([e.row for e in examples], np.int64),
            np.array([(e.prompt_at, e.prompt_end) for e in examples], np.int32).reshape(-1, 2),
        )


class TokenTable(Sequence[Example]):
    """A sequence of examples that are created on access.

    Args:
        ids_T: token ids of all examples, concatenated.
        offsets: [R + 1] start of each example, and the end of the last one.
        spans_S2, span_offsets: label spans, stored in the same way.
        branches_B2, branch_offsets: branches, stored in the same way.
        rows_R: index of each example in the ``RowDataset``.
        places_R2: ``prompt_at`` and ``prompt_end`` of each example.
    """

    def __init__(
        self,
        ids_T: Any,
        offsets: Any,
        spans_S2: Any,
        span_offsets: Any,
        branches_B2: Any,
        branch_offsets: Any,
        rows_R: Any,
        places_R2: Any,
    ) -> None:
        # Views as plain arrays: slicing a memmap object takes several times as long.
        self._ids_T, self._offsets = np.asarray(ids_T), np.asarray(offsets)
        self._spans_S2, self._span_offsets = np.asarray(spans_S2), np.asarray(span_offsets)
        self._branches_B2 = np.asarray(branches_B2)
        self._branch_offsets = np.asarray(branch_offsets)
        self.rows_R, self._places_R2 = np.asarray(rows_R), np.asarray(places_R2)

    def __len__(self) -> int:
        return len(self.rows_R)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        index %= len(self)
        start, stop = self._offsets[index : index + 2].tolist()
        at, end = self._places_R2[index].tolist()
        return Example(
            tuple(self._ids_T[start:stop].tolist()),
            _pairs(self._spans_S2, self._span_offsets, index),
            int(self.rows_R[index]),
            at,
            end,
            _pairs(self._branches_B2, self._branch_offsets, index),
        )

    @cached_property
    def lengths(self) -> NDArray[np.int32]:
        return np.diff(self._offsets).astype(np.int32)

    @cached_property
    def own_lengths(self) -> NDArray[np.int32]:
        """Tokens of each example without those that all examples have in the prompt's segment."""
        return self.lengths - np.int32(0 if self.leading is None else len(self.leading.input_ids))

    @cached_property
    def leading(self) -> Example | None:
        """The tokens that all examples have in the prompt's segment.

        None if tokens before the virtual tokens differ.
        """
        if not len(self):
            return None
        at = int(self._places_R2[0, 0])
        end = self._common(self._offsets[:-1], int(self._places_R2[:, 1].min()))
        if end < at or (self._places_R2[:, 0] != at).any():
            return None
        return Example(tuple(self._ids_T[:end].tolist()), (), -1, at, end)

    def num_shared(self, indices_R: NDArray[np.int64]) -> int:
        """Return the number of leading tokens that these examples have in common.

        The token that predicts the first label is never one of them, nor is a token after the
        beginning of a branch. 0 for a single example.
        """
        if len(indices_R) < 2:
            return 0
        first_labels_R = self._spans_S2[self._span_offsets[indices_R], 0]
        most = int(first_labels_R.min()) - 1
        if len(self._branches_B2):
            most = min(most, int(self._branches_B2[:, 1].min()))
        return self._common(self._offsets[indices_R], most)

    def _common(self, starts_R: NDArray[np.int64], most: int) -> int:
        """Return how many tokens, at most ``most``, are equal from each of these indices on."""
        # By column: a copy of the leading tokens of all rows may not fit in memory.
        same = takewhile(
            lambda place: (self._ids_T[starts_R + place] == self._ids_T[starts_R[0] + place]).all(),
            range(most),
        )
        return sum(1 for _ in same)

    @cached_property
    def num_labels(self) -> NDArray[np.int32]:
        totals = _offsets(self._spans_S2[:, 1] - self._spans_S2[:, 0])
        return np.diff(totals[self._span_offsets]).astype(np.int32)

    def first_without(self, ids: Sequence[int]) -> Example | None:
        """Return the first example that does not begin with ``ids``."""
        begins_R = self.lengths >= len(ids)
        starts_R = np.where(begins_R, self._offsets[:-1], 0)
        for place, token in enumerate(ids):
            if not begins_R.all():
                break
            begins_R = begins_R & (self._ids_T[starts_R + place] == token)
        others = np.flatnonzero(~begins_R)
        return self[int(others[0])] if len(others) else None

    def first_beyond(self, vocab_size: int) -> Example | None:
        """Return the first example with an id of at least ``vocab_size``."""
        for start in range(0, len(self._ids_T), _CHUNK):
            beyond = np.flatnonzero(self._ids_T[start : start + _CHUNK] >= vocab_size)
            if len(beyond):
                place = start + int(beyond[0])
                return self[int(np.searchsorted(self._offsets, place, side="right")) - 1]
        return None


def _pairs(
    pairs_N2: NDArray[np.int32], offsets: NDArray[np.int64], index: int
) -> tuple[tuple[int, int], ...]:
    """Return the pairs of one example."""
    first, last = offsets[index : index + 2].tolist()
    return tuple((a, b) for a, b in pairs_N2[first:last].tolist()) if first < last else ()


def in_memory(blocks: Iterable[TokenBlock]) -> TokenTable:
    """Concatenate blocks of few rows into a table."""
    parts = list(blocks) or [TokenBlock.of([])]
    return TokenTable(
        np.concatenate([block.ids_T for block in parts]),
        _offsets(np.concatenate([block.lengths_R for block in parts])),
        np.concatenate([block.spans_S2 for block in parts]),
        _offsets(np.concatenate([block.span_counts_R for block in parts])),
        np.concatenate([block.branches_B2 for block in parts]),
        _offsets(np.concatenate([block.branch_counts_R for block in parts])),
        np.concatenate([block.rows_R for block in parts]),
        np.concatenate([block.places_R2 for block in parts]),
    )


def write(folder: Path, blocks: Iterable[TokenBlock]) -> dict[str, int]:
    """Write a table's files into an existing folder; return the JSON record for ``open_table``."""
    arrays = {
        name: _Growing(folder / f"{name}.npy", dtype, columns) for name, dtype, columns in _ARRAYS
    }
    ids, spans, branches = arrays["ids"], arrays["spans"], arrays["branches"]
    for name in ("offsets", "span_offsets", "branch_offsets"):
        arrays[name].append(np.zeros(1, np.int64))
    for block in blocks:
        arrays["offsets"].append(_offsets(block.lengths_R)[1:] + ids.size)
        arrays["span_offsets"].append(_offsets(block.span_counts_R)[1:] + spans.size)
        arrays["branch_offsets"].append(_offsets(block.branch_counts_R)[1:] + branches.size)
        ids.append(block.ids_T)
        spans.append(block.spans_S2)
        branches.append(block.branches_B2)
        arrays["rows"].append(block.rows_R)
        arrays["places"].append(block.places_R2)
    for growing in arrays.values():
        growing.close()
    return {
        "format": FORMAT,
        "tokens": ids.size,
        "spans": spans.size,
        "branches": branches.size,
        "examples": arrays["rows"].size,
    }


def open_table(folder: Path, record: dict[str, int]) -> TokenTable:
    """Memory-map a table that ``write`` wrote.

    Raises:
        OSError, ValueError, EOFError: files are missing, truncated or do not match ``record``.
    """
    arrays = [
        np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name, *_ in _ARRAYS
    ]
    examples = record["examples"]
    sizes = [record["tokens"], examples + 1, record["spans"], examples + 1]
    sizes += [record["branches"], examples + 1, examples, examples]
    if record["format"] != FORMAT or [len(array) for array in arrays] != sizes:
        raise ValueError(f"{folder}: holds {[len(a) for a in arrays]}, not {json.dumps(record)}")
    return TokenTable(*arrays)


class _Growing:
    """An .npy file whose first axis grows, for which numpy reserves space in the header."""

    def __init__(self, path: Path, dtype: Any, columns: int | None = None) -> None:
        self.size = 0
        self._dtype, self._columns = np.dtype(dtype), columns
        self._stream = path.open("wb")
        self._header_bytes = self._write_header()

    def append(self, array: NDArray[Any]) -> None:
        np.ascontiguousarray(array, self._dtype).tofile(self._stream)
        self.size += len(array)

    def close(self) -> None:
        self._stream.seek(0)
        assert self._write_header() == self._header_bytes
        self._stream.close()

    def _write_header(self) -> int:
        shape = (self.size,) if self._columns is None else (self.size, self._columns)
        descr = np.lib.format.dtype_to_descr(self._dtype)
        header = {"descr": descr, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._stream, header)
        return self._stream.tell()


def _offsets(counts: NDArray[Any]) -> NDArray[np.int64]:
    """Cumulative sums that start at 0."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])


def runs(inside: Sequence[Any]) -> tuple[tuple[int, int], ...]:
    """Return (start, stop) of each run of true values."""
    bounded = [False, *map(bool, inside), False]
    edges = [i for i in range(len(inside) + 1) if bounded[i] != bounded[i + 1]]
    return tuple(zip(edges[::2], edges[1::2], strict=True))
