"""Data that is a table already: parquet and arrow files, saved folders, hub data sets. No torch."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.config import DataSource
from trainer.data.arrow_values import class_names, column_values, is_plain
from trainer.runtime.errors import BadInput
from trainer.runtime.json_file import parse_json, read_json_object

TABLE_FORMATS = (".parquet", ".arrow")
_BATCH = 1 << 14
#: Builders of `datasets` that only parse a table. Others run archives, pickles or media decoders.
_PLAIN_BUILDERS = ("parquet", "json", "csv", "text", "arrow")


class Table:
    """Record batches of a file or of a hub data set, read as they are asked for.

    Attributes:
        names: all its columns.
    """

    def __init__(
        self,
        name: str,
        names: list[str],
        file: Path | None,
        features: Mapping[str, Any],
        dataset: Any = None,
    ) -> None:
        self.name = name
        self.names = names
        self._file, self._features, self._dataset = file, features, dataset

    def is_plain(self, column: str) -> bool:
        """Whether a column means what its Arrow type says: no class numbers, no JSON text."""
        return is_plain(self._features.get(column))

    def class_names(self, column: str) -> list[str] | None:
        """The names of the classes whose numbers a column holds; None where it holds none."""
        return class_names(self._features.get(column))

    def rows(self, columns: Sequence[str], keep: Collection[str] = ()) -> Iterator[dict[str, Any]]:
        """Every row, with the values that a JSON file would hold (``arrow_values``).

        Args:
            columns: those that are read.
            keep: columns whose outermost objects keep keys that are null.

        Raises:
            BadInput: the file is damaged, or a column has a type that no template can write.
        """
        for batch in self.batches(columns):
            names = [name for name in self.names if name in columns]
            try:
                values = [
                    column_values(
                        batch.column(name), name, self._features.get(name), keep=name in keep
                    )
                    for name in names
                ]
            except BadInput as error:
                raise BadInput([f"{self.name}: {text}" for text in error.problems]) from None
            rows = zip(*values, strict=True) if values else ((),) * batch.num_rows
            yield from (dict(zip(names, row, strict=True)) for row in rows)

    def batches(self, columns: Sequence[str]) -> Iterator[Any]:
        """``pyarrow.RecordBatch`` of the wanted columns that there are, in the table's order.

        Raises:
            BadInput: the file is damaged.
        """
        import pyarrow

        wanted = [name for name in self.names if name in columns]
        row = 0
        try:
            for batch in self._read(wanted):
                for start in range(0, batch.num_rows, _BATCH):
                    part = batch.slice(start, _BATCH)
                    part.validate(full=True)
                    yield part
                    row += part.num_rows
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise BadInput(
                f"{self.name}: cannot be read behind row {row}: {_reason(error)}; write it again"
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
            schema = parquet.ParquetFile(file).schema_arrow
        else:
            schema = _arrow_reader(file)[0].schema
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise BadInput(
            f"{file}: is not a whole {kind} file: {_reason(error)}; write it again"
        ) from None
    twice = sorted({name for name in schema.names if schema.names.count(name) > 1})
    if twice:
        raise BadInput(f"{file}: duplicate column {twice[0]!r}; rename one")
    return Table(str(file), list(schema.names), file, _features(file, schema.metadata))


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _features(file: Path, metadata: Mapping[bytes, bytes] | None) -> Mapping[str, Any]:
    """The features that ``datasets`` wrote beside the schema, in their JSON form."""
    written = (metadata or {}).get(b"huggingface")
    if written is None:
        return {}
    try:
        features = parse_json(written)["info"]["features"]
        return features if isinstance(features, Mapping) else {}
    except (ValueError, KeyError, TypeError):
        raise BadInput(
            f"{file}: its 'huggingface' metadata cannot be read; write it again"
        ) from None


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
        names = _strings(splits, read_json_object(splits).get("splits"), "splits")
        if split not in names:
            raise BadInput(
                f"{folder}: has no split {split!r}; it has {', '.join(names)}: name one with "
                "{path: FOLDER, split: NAME}"
            )
        folder = folder / split
    state = folder / "state.json"
    if not state.is_file():
        if splits.is_file():
            raise BadInput(f"{folder}: split {split!r} has no state.json; save the data set again")
        return None
    listed = read_json_object(state).get("_data_files")
    items = listed if isinstance(listed, list) else []
    files = [item.get("filename") if isinstance(item, dict) else item for item in items]
    return [folder / name for name in _strings(state, files, "_data_files")]


def _strings(file: Path, found: Any, key: str) -> list[str]:
    """A list of plain names in a file of ``save_to_disk``."""
    if isinstance(found, list) and found and all(_is_name(name) for name in found):
        return found
    raise BadInput(f"{file}: {key!r} must list names; save the data set again")


def _is_name(name: Any) -> bool:
    """Whether a text names something inside its folder."""
    plain = isinstance(name, str) and name.isprintable()
    return plain and name not in ("", ".", "..") and not set(name) & set("/\\")


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
    features = dataset.features.to_dict()
    return Table(name, list(dataset.column_names), None, features, dataset), files
