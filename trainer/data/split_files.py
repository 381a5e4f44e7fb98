"""Find the splits in a folder by the naming conventions of the Hugging Face hub. Imports no torch.

The conventions are those of ``datasets`` (``datasets.data_files``): the section ``configs`` in the
header of ``README.md``, or else words such as ``train`` in names of folders and files.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any

from trainer.config import WrittenSource, yaml_parser
from trainer.data.table_readers import TABLE_FORMATS, saved_splits
from trainer.data.text_readers import GZIP, format_of

TRAIN = ("train", "training")
#: Words for splits to validate on, in order of preference.
VALIDATION = ("validation", "valid", "dev", "val", "test", "testing", "eval", "evaluation")
#: Formats of hub data sets; of a split in several formats, the first is read.
_FORMATS = (*TABLE_FORMATS, ".jsonl", ".json", ".csv", ".tsv")
_NOT_ROWS = ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json")
_SEPARATORS = "-._ 0-9"
#: Names of shards, such as ``train_sft-00000-of-00002.parquet``.
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}(-\w+)?")
_HEADER = re.compile(r"---\r?\n(.*?)\n---\s", re.DOTALL)
#: Folders between a data set and its files that are no configurations.
_PLAIN_FOLDERS = ("data", "dataset", "datasets")


@dataclass(frozen=True)
class SplitPair:
    """Rows to train on, and rows to validate on, of one configuration.

    Attributes:
        config: name of the configuration; empty without configurations.
        train_split, validation_split: names of the splits; ``validation_split`` is empty if there
            is none.
    """

    config: str
    train_split: str
    train: WrittenSource
    validation_split: str = ""
    validation: WrittenSource | None = None


def split_pairs(folder: Path) -> list[SplitPair]:
    """Find the splits of a folder: one pair for each configuration and split to train on.

    The folder is one of ``DatasetDict.save_to_disk``, or a copy of a repository of the hub. A
    single file of rows is to train on. Empty if no split is found.
    """
    if (names := saved_splits(folder)) is not None:
        sources: dict[str, WrittenSource] = {
            name: {"path": str(folder), "split": name} if name != "train" else str(folder)
            for name in names
        }
        return list(pairs_of("", sources))
    files = sorted(_data_files(folder))
    configs = _listed_configs(folder) or _named_configs(folder, files)
    if not configs and len(files) == 1:
        configs = {"": {"train": files}}
    return [
        pair
        for config, splits in configs.items()
        for pair in pairs_of(config, {name: _source(of) for name, of in splits.items()})
    ]


def _data_files(folder: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        for name in names:
            if name not in _NOT_ROWS and name[0] != "." and format_of(name) in _FORMATS:
                yield Path(place, name)


def pairs_of(config: str, splits: Mapping[str, WrittenSource]) -> Iterator[SplitPair]:
    """Yield every split to train on, with one to validate on, of named splits."""
    trains = [name for name in splits if name in TRAIN] or [
        name for name in splits if re.match("train(?![a-z])", name)
    ]
    for train in trains:
        validation = _validation_of(train, splits)
        yield SplitPair(config, train, splits[train], validation, splits.get(validation))


def _validation_of(train: str, splits: Collection[str]) -> str:
    """Return the split to validate on: ``test_sft`` for ``train_sft``; empty if there is none."""
    suffix = re.sub("^train(ing)?", "", train)
    exact = [word + suffix for word in VALIDATION if word + suffix in splits]
    similar = [
        name
        for word in VALIDATION
        for name in splits
        if not suffix and re.match(f"{word}(?![a-z])", name)
    ]
    return next(iter([*exact, *similar]), "")


def _listed_configs(folder: Path) -> dict[str, dict[str, list[Path]]]:
    """Return the splits that the header of ``README.md`` lists; empty without such a list."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8", errors="replace")
        header = _HEADER.match(text.removeprefix("\ufeff"))
        data = yaml_parser.parse(header[1]).data if header else None
    except (OSError, yaml_parser.YamlError):
        return {}
    listed = data.get("configs") if isinstance(data, dict) else None
    configs: dict[str, dict[str, list[Path]]] = {}
    for item in listed if isinstance(listed, list) else []:
        if not isinstance(item, dict):
            continue
        name = str(item.get("config_name", "default"))
        splits = {
            split: files
            for split, patterns in _patterns(item.get("data_files")).items()
            if (files := _matching(folder, patterns))
        }
        if splits:
            configs[name] = splits
    return configs


def _patterns(data_files: Any) -> dict[str, list[str]]:
    """Return split -> patterns of ``data_files`` in one of its forms."""
    items = data_files if isinstance(data_files, list) else [data_files]
    splits: dict[str, list[str]] = {}
    for item in items:
        split, path = "train", item
        if isinstance(item, dict):
            split, path = str(item.get("split")), item.get("path")
        paths = path if isinstance(path, list) else [path]
        splits.setdefault(split, []).extend(p for p in paths if isinstance(p, str))
    return splits


def _matching(folder: Path, patterns: Iterable[str]) -> list[Path]:
    paths = {
        folder / name
        for pattern in patterns
        if not {"..", "/"} & {*Path(pattern).parts}  # stay inside the folder
        for name in glob.glob(pattern, root_dir=folder, recursive=True)
    }
    return sorted(path for path in paths if format_of(path) in _FORMATS and path.is_file())


def _named_configs(folder: Path, files: Iterable[Path]) -> dict[str, dict[str, list[Path]]]:
    """Return configuration -> split -> files, by the names of folders and files.

    Files to train on whose other words differ, such as ``en_train`` and ``fr_train``, are of
    several configurations.
    """
    places: dict[str, list[tuple[str, str, Path]]] = {}
    for file in files:
        *folders, _ = file.relative_to(folder).parts
        name, words = file.name.split(".")[0], ""
        split = next(filter(None, map(_split_of, folders)), "")
        above = takewhile(lambda part: not _split_of(part), folders)
        place = "/".join(part for part in above if part not in _PLAIN_FOLDERS)
        if not split and (shard := _SHARD.fullmatch(name)):
            split = shard[1]
        elif not split:
            split, words = _split_of(file.name), _other_words(file)
        if split:
            places.setdefault(place, []).append((split, words, file))
    configs: dict[str, dict[str, list[Path]]] = {}
    for place, named in places.items():
        has_several = len({words for split, words, _ in named if split == "train"}) > 1
        for split, words, file in named:
            config = "/".join(filter(None, (place, words if has_several else "")))
            configs.setdefault(config, {}).setdefault(split, []).append(file)
    return configs


def _other_words(file: Path) -> str:
    """Return the words of a file's name without its split, numbers and format."""
    words = re.split(f"[{_SEPARATORS}]+", file.name.lower())
    formats = {kind.removeprefix(".") for kind in (*_FORMATS, ".ndjson", GZIP)}
    return "-".join(word for word in words if word not in {"", *TRAIN, *VALIDATION, *formats})


def _split_of(name: str) -> str:
    """Return the usual name of the split that a name contains as a word; else an empty one."""
    for split, words in (
        ("train", TRAIN),
        ("validation", VALIDATION[:4]),
        ("test", VALIDATION[4:]),
    ):
        if re.search(f"(^|[{_SEPARATORS}])({'|'.join(words)})([{_SEPARATORS}]|$)", name):
            return split
    return ""


def _source(files: Sequence[Path]) -> WrittenSource:
    """Return a path or glob that matches exactly these files of one format; else their list."""
    for kind in _FORMATS:
        if of_kind := [file for file in files if format_of(file) == kind]:
            break
    if len(of_kind) == 1:
        return str(of_kind[0])
    places = {file.parent for file in of_kind}
    if len(places) > 1:
        pattern = str(Path(os.path.commonpath(places), "**", f"*{of_kind[0].suffix}"))
    else:
        characters = zip(*(file.name for file in of_kind), strict=False)
        same = takewhile(lambda column: len(set(column)) == 1, characters)
        beginning = "".join(column[0] for column in same).rstrip("0123456789")
        pattern = str(of_kind[0].with_name(f"{beginning}*{of_kind[0].suffix}"))
    paths = list(map(str, of_kind))
    return pattern if sorted(glob.glob(pattern, recursive=True)) == paths else paths
