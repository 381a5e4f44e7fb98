"""Data that is a table already: parquet and arrow files, saved folders, hub data sets. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from trainer.config import DataSource
from trainer.errors import BadInput

TABLE_FORMATS = (".parquet", ".arrow")
_BATCH = 1 << 14
#: Builders of `datasets` that only parse a table. Others run archives, pickles or media decoders.
_PLAIN_BUILDERS = ("parquet", "json", "csv", "text", "arrow")


class Table:
    """Record batches of a file or of a hub data set, read as they are asked for.

    Attributes:
        names: all its columns.
    """

    def __init__(self, name: str, names: list[str], file: Path | None, dataset: Any = None) -> None:
        self.name = name
        self.names = names
        self._file, self._dataset = file, dataset

    def batches(self, columns: Sequence[str]) -> Iterator[Any]:
        """``pyarrow.RecordBatch`` of the wanted columns that there are, in the table's order.

        Raises:
            BadInput: the file is damaged.
        """
        wanted = [name for name in self.names if name in columns]
        row = 0
        try:
            for batch in self._read(wanted):
                for start in range(0, batch.num_rows, _BATCH):
                    part = batch.slice(start, _BATCH)
                    part.validate(full=True)
                    yield part
                    row += part.num_rows
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise BadInput(
                f"{self.name}: cannot be read behind row {row}: {reason}; write it again"
            ) from None

    def _read(self, wanted: list[str]) -> Iterator[Any]:
        from pyarrow import parquet

        if self._dataset is not None:
            yield from self._dataset.data.table.select(wanted).to_batches()
        elif self._file is not None and self._file.suffix.lower() == ".parquet":
            yield from parquet.ParquetFile(self._file).iter_batches(_BATCH, columns=wanted)
        else:
            for batch in _open_arrow(self._file):
                yield batch.select(wanted)


def open_table(file: Path) -> Table:
    """A parquet file, or an arrow file: an IPC stream, as `datasets` writes it, or an IPC file.

    Raises:
        BadInput: it is neither, or cut short.
    """
    import pyarrow
    from pyarrow import parquet

    kind = file.suffix.lower().removeprefix(".")
    try:
        if kind == "parquet":
            names = parquet.ParquetFile(file).schema_arrow.names
        else:
            names = _arrow_reader(file)[0].schema.names
    except (pyarrow.ArrowInvalid, OSError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"{file}: is not a whole {kind} file: {reason}; write it again") from None
    return Table(str(file), list(names), file)


def _arrow_reader(file: Path) -> tuple[Any, bool]:
    """(reader, whether it is a stream)."""
    import pyarrow

    source = pyarrow.memory_map(str(file))
    try:
        return pyarrow.ipc.open_stream(source), True
    except pyarrow.ArrowInvalid:
        source.seek(0)
        return pyarrow.ipc.open_file(source), False


def _open_arrow(file: Path | None) -> Iterator[Any]:
    assert file is not None
    reader, stream = _arrow_reader(file)
    if stream:
        yield from reader
    else:
        for number in range(reader.num_record_batches):
            yield reader.get_batch(number)


def saved_files(folder: Path, split: str) -> list[Path] | None:
    """Arrow files of a folder written by ``save_to_disk``; None if it is no such folder.

    Raises:
        BadInput: the folder holds several splits and none of this name.
    """
    splits = folder / "dataset_dict.json"
    if splits.is_file():
        names = json.loads(splits.read_text(encoding="utf-8"))["splits"]
        if split not in names:
            raise BadInput(
                f"{folder}: has no split {split!r}; it has {', '.join(names)}: name one with "
                "{path: FOLDER, split: NAME}"
            )
        folder = folder / split
    state = folder / "state.json"
    if not state.is_file():
        return None
    listed = json.loads(state.read_text(encoding="utf-8"))["_data_files"]
    return [folder / item["filename"] for item in listed]


def open_hub(source: DataSource, split: str) -> tuple[Table, list[Path]]:
    """A data set of the hub, or of its cache where HF_HUB_OFFLINE says so, and the files behind it.

    Only data sets that are plain tables are read; none runs code of its own.

    Raises:
        BadInput: it cannot be found or loaded, or is of another kind.
    """
    import datasets

    datasets.disable_progress_bars()
    label = source.label
    try:
        builder = datasets.load_dataset_builder(source.hub, source.name, revision=source.revision)
        kind = type(builder).__module__.split(".")[-1]
        if kind not in (*_PLAIN_BUILDERS, "cache"):
            raise BadInput(
                f"{label}: is read by the {kind!r} builder; only tables are "
                f"({', '.join(_PLAIN_BUILDERS)}): save its rows as parquet"
            )
        dataset = datasets.load_dataset(
            source.hub, source.name, split=split, revision=source.revision
        )
    except BadInput:
        raise
    except Exception as error:  # what can go wrong on the way to a server has no common class
        reason = str(error).strip().split("\n")[0]
        raise BadInput(f"{label}: cannot be loaded: {type(error).__name__}: {reason}") from None
    name = f"{label}[{split}]"
    files = [Path(item["filename"]) for item in dataset.cache_files]
    return Table(name, list(dataset.column_names), None, dataset), files
