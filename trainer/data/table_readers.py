"""Tables: parquet and arrow files, saved folders, hub data sets. Imports no torch."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config import DataSource
from trainer.data.arrow_values import class_names, column_values, is_plain, is_supported
from trainer.runtime.errors import BadInput
from trainer.runtime.json_file import parse_json, read_json_object

TABLE_FORMATS = (".parquet", ".arrow")
_BATCH = 1 << 14
#: Builders of ``datasets`` that only parse a table. Others unpack archives, pickles or media.
_PLAIN_BUILDERS = ("parquet", "json", "csv", "text", "arrow")


@dataclass(frozen=True)
class Table:
    """A file or hub data set whose record batches are read on demand.

    Attributes:
        name: of the table, for messages.
        names: all columns.
        file: None for a hub data set.
        features: column -> its feature of ``datasets``, if the table has features.
        dataset: the hub data set.
    """

    name: str
    names: list[str]
    file: Path | None
    features: Mapping[str, Any]
    dataset: Any = None

    def is_plain(self, column: str) -> bool:
        """Whether the values of a column need no conversion: no class numbers, no JSON text."""
        return is_plain(self.features.get(column))

    def class_names(self, column: str) -> list[str] | None:
        """Names of the classes of a column of class numbers; None for other columns."""
        return class_names(self.features.get(column))

    def supported(self) -> list[str]:
        """Return the columns whose types can be read; bytes of images, for example, cannot."""
        schema = _schema(self.file) if self.file is not None else self.dataset.data.table.schema
        return [n for n in self.names if is_supported(schema.field(n).type, self.features.get(n))]

    def rows(self, columns: Sequence[str], keep: Collection[str] = ()) -> Iterator[dict[str, Any]]:
        """Yield every row, converted to JSON values by ``arrow_values``.

        Args:
            columns: the columns to read.
            keep: columns whose outermost objects keep keys that are null.

        Raises:
            BadInput: the file is damaged, or a column has an unsupported type.
        """
        for batch in self.batches(columns):
            names = [name for name in self.names if name in columns]
            try:
                values = [
                    column_values(
                        batch.column(name), name, self.features.get(name), keep=name in keep
                    )
                    for name in names
                ]
            except BadInput as error:
                raise BadInput([f"{self.name}: {text}" for text in error.problems]) from None
            rows = zip(*values, strict=True) if values else ((),) * batch.num_rows
            yield from (dict(zip(names, row, strict=True)) for row in rows)

    def batches(self, columns: Sequence[str]) -> Iterator[Any]:
        """Yield ``pyarrow.RecordBatch`` of the existing ones of ``columns``, in the table's order.

        Raises ``BadInput`` if the file is damaged.
        """
        import pyarrow

        selected = [name for name in self.names if name in columns]
        row = 0
        try:
            for batch in self._read(selected):
                for start in range(0, batch.num_rows, _BATCH):
                    part = batch.slice(start, _BATCH)
                    part.validate(full=True)
                    yield part
                    row += part.num_rows
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            raise BadInput(
                f"{self.name}: cannot be read after row {row}: {_reason(error)}; write it again"
            ) from None

    def _read(self, selected: list[str]) -> Iterator[Any]:
        from pyarrow import parquet

        if self.file is None:
            yield from self.dataset.data.table.select(selected).to_batches()
        elif self.file.suffix.lower() == ".parquet":
            yield from parquet.ParquetFile(self.file).iter_batches(_BATCH, columns=selected)
        else:
            reader, is_stream = _arrow_reader(self.file)
            batches = (
                reader if is_stream else map(reader.get_batch, range(reader.num_record_batches))
            )
            for batch in batches:
                yield batch.select(selected)


def open_table(file: Path) -> Table:
    """Open a parquet file or an arrow file (IPC stream, as written by ``datasets``, or IPC file).

    Raises:
        BadInput: the file is truncated or has another format.
    """
    import pyarrow

    kind = file.suffix.lower().removeprefix(".")
    try:
        schema = _schema(file)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise BadInput(
            f"{file}: is not a complete {kind} file: {_reason(error)}; write it again"
        ) from None
    twice = sorted({name for name in schema.names if schema.names.count(name) > 1})
    if twice:
        raise BadInput(f"{file}: duplicate column {twice[0]!r}; rename one")
    return Table(str(file), list(schema.names), file, _features(file, schema.metadata))


def _schema(file: Path) -> Any:
    from pyarrow import parquet

    if file.suffix.lower() == ".parquet":
        return parquet.ParquetFile(file).schema_arrow
    return _arrow_reader(file)[0].schema


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _features(file: Path, metadata: Mapping[bytes, bytes] | None) -> Mapping[str, Any]:
    """Return the features that ``datasets`` wrote into the schema's metadata, in JSON form."""
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
    """Return (reader, whether it is an IPC stream)."""
    import pyarrow

    source = pyarrow.memory_map(str(file))
    try:
        return pyarrow.ipc.open_stream(source), True
    except pyarrow.ArrowInvalid:
        source.seek(0)
        return pyarrow.ipc.open_file(source), False


def saved_files(folder: Path, split: str) -> list[Path] | None:
    """List the arrow files of a folder written by ``save_to_disk``; None for another folder.

    Raises:
        BadInput: the folder has several splits, but not this one.
    """
    names = saved_splits(folder)
    if names is not None:
        if split not in names:
            raise BadInput(
                f"{folder}: has no split {split!r}; it has {', '.join(names)}: name one with "
                "{path: FOLDER, split: NAME}"
            )
        folder = folder / split
    state = folder / "state.json"
    if not state.is_file():
        if names is not None:
            raise BadInput(f"{folder}: split {split!r} has no state.json; save the data set again")
        return None
    listed = read_json_object(state).get("_data_files")
    items = listed if isinstance(listed, list) else []
    files = [item.get("filename") if isinstance(item, dict) else item for item in items]
    return [folder / name for name in _strings(state, files, "_data_files")]


def saved_splits(folder: Path) -> list[str] | None:
    """List the splits of a folder written by ``DatasetDict.save_to_disk``; None for another one."""
    file = folder / "dataset_dict.json"
    if not file.is_file():
        return None
    return _strings(file, read_json_object(file).get("splits"), "splits")


def _strings(file: Path, value: Any, key: str) -> list[str]:
    """Return ``value`` if it is a list of file names; else raise ``BadInput``."""
    if isinstance(value, list) and value and all(map(_is_name, value)):
        return value
    raise BadInput(f"{file}: {key!r} must list names; save the data set again")


def _is_name(name: Any) -> bool:
    """Whether a value is a plain file name, which cannot lead out of its folder."""
    plain = isinstance(name, str) and name.isprintable()
    return plain and name not in ("", ".", "..") and not set(name) & set("/\\")


def hub_splits(source: DataSource) -> list[str]:
    """List the splits of a data set of the hub; empty if they are not known."""
    try:
        import datasets

        names: list[str] = datasets.get_dataset_split_names(
            source.hub, source.name, revision=source.revision
        )
    except Exception:  # ``open_hub`` reports it
        return []
    return names


def open_hub(source: DataSource, split: str) -> tuple[Table, list[Path]]:
    """Load a data set from the hub, or from its cache if HF_HUB_OFFLINE is set: (table, its files).

    Only data sets that are plain tables are supported; code in the repository is never run.

    Raises:
        BadInput: the data set cannot be loaded, or is not a plain table.
    """
    label = source.label
    try:
        import datasets
    except ImportError:
        raise BadInput(
            f"{label}: data sets of the hub need the package datasets, which is not installed; run "
            "`pip install 'promptshard[hub]'`, or save the rows as parquet or JSON lines and give "
            "the file"
        ) from None
    datasets.disable_progress_bars()
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
    except Exception as error:  # network errors have no common class
        reason, *more = str(error).strip().split("\n")
        if "Config name is missing" in reason and more:
            configs = more[0].partition(": ")[2]
            raise BadInput(
                f"{label}: has several configurations: {configs}; name one as {label}/NAME"
            ) from None
        raise BadInput(f"{label}: cannot be loaded: {type(error).__name__}: {reason}") from None
    name = f"{label}[{split}]"
    files = [Path(item["filename"]) for item in dataset.cache_files]
    features = dataset.features.to_dict()
    return Table(name, list(dataset.column_names), None, features, dataset), files
