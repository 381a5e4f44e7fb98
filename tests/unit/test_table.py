"""Tables of tokens: the same in memory, in files, from workers; made once, whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.test_tokenize import make_task, make_tokenizer
from trainer.data.dataset import RowDataset
from trainer.data.splits import load_rows
from trainer.data.token_cache import cached
from trainer.data.token_table import Example, TokenBlock, TokenTable, in_memory, open_table, write
from trainer.data.tokenization import tokenize, worker_pool
from trainer.runtime.cache_dir import cache_dir
from trainer.runtime.errors import BadInput


@st.composite
def examples(draw: st.DrawFn) -> list[Example]:
    rows = []
    for row in draw(st.lists(st.integers(0, 2**40), max_size=12)):
        ids = draw(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=20))
        cuts = sorted(draw(st.sets(st.integers(0, len(ids)), min_size=2, max_size=6)))
        spans = tuple(zip(cuts[::2], cuts[1::2], strict=False))
        rows.append(Example(tuple(ids), spans, row))
    return rows


def split(items: list[Example], cut: int) -> list[TokenBlock]:
    return [TokenBlock.of(items[:cut]), TokenBlock.of(items[cut:])]


@settings(deadline=None, max_examples=40)
@given(examples(), st.integers(0, 12))
def test_a_token_table_round_trips(tmp_path_factory, items, cut):
    folder = tmp_path_factory.mktemp("table")
    mapped = open_table(folder, write(folder, split(items, cut)))
    for table in (in_memory(split(items, cut)), mapped):
        assert list(table) == items
        assert table[: cut // 2] == items[: cut // 2]
        assert table.lengths.tolist() == [e.num_tokens for e in items]
        assert table.num_labels.tolist() == [e.num_labels for e in items]
        highest = max((max(e.input_ids) for e in items), default=0)
        assert table.first_beyond(highest + 1) is None
        if items:
            row = table.first_beyond(highest)
            assert row == next(e for e in items if max(e.input_ids) == highest)
            assert table[-1] == items[-1]
        with pytest.raises(IndexError):
            table[len(items)]


def test_a_file_that_was_cut_short_is_no_table(tmp_path):
    written = write(tmp_path, [TokenBlock.of([Example.with_target((1, 2, 3), 1, 0)] * 9)])
    with pytest.raises(ValueError, match="not"):
        open_table(tmp_path, {**written, "format": 0})
    ids = tmp_path / "ids.npy"
    ids.write_bytes(ids.read_bytes()[:-4])
    with pytest.raises(ValueError, match="mmap"):
        open_table(tmp_path, written)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PROMPTSHARD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


class Maker:
    """Counts how often a table is made."""

    def __init__(self) -> None:
        self.made = 0

    def __call__(self) -> list[TokenBlock]:
        self.made += 1
        return [TokenBlock.of([Example.with_target((1, 2), 1, 0)])]

    def table(self, identity: Any = "x") -> TokenTable:
        return cached({"of": identity}, self, lambda: {"skipped": 3, "truncated": 0})[0]


def test_a_table_is_made_once(folder):
    maker = Maker()
    assert list(maker.table()) == list(maker.table()) == [Example.with_target((1, 2), 1, 0)]
    assert maker.made == 1
    maker.table("y")
    assert maker.made == 2
    assert cached({"of": "x"}, maker, dict)[1]["skipped"] == 3
    assert not [path for path in folder.iterdir() if "writing" in path.name]


def flip(file: Path, at: int) -> None:
    """Change one bit of a file and neither its size nor its time."""
    content, stat = bytearray(file.read_bytes()), file.stat()
    content[at] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_a_damaged_table_is_made_again(folder):
    """A cut file, one flipped bit of an id, a changed count, and JSON that is none."""
    rows = [Example.with_target((1, 2), 1, 0)]
    maker = Maker()
    maker.table()
    (place,) = (path for path in folder.iterdir() if path.is_dir())
    record = place / "table.json"
    damages = [
        lambda: (place / "ids.npy").write_bytes(b""),
        *[lambda name=f: flip(place / name, -1) for f in ("ids.npy", "rows.npy", "offsets.npy")],
        lambda: flip(place / "spans.npy", 10),
        lambda: record.write_text(record.read_text().replace('"skipped": 3', '"skipped": 4')),
        lambda: record.write_text("[" * 100_000),
        lambda: record.write_text('{"table": 5}'),
        lambda: record.unlink(),
        lambda: (shutil.rmtree(place), place.write_text("")),
    ]
    for times, damage in enumerate(damages, start=2):
        damage()
        table, counts = cached({"of": "x"}, maker, lambda: {"skipped": 3, "truncated": 0})
        assert (list(table), counts["skipped"], maker.made) == (rows, 3, times)
    assert list(maker.table()) == rows
    assert maker.made == 1 + len(damages)


def test_a_failed_tokenization_leaves_no_file(folder):
    def make() -> Any:
        yield TokenBlock.of([Example.with_target((1, 2), 1, 0)])
        raise BadInput("a row is wrong")

    with pytest.raises(BadInput, match="a row is wrong"):
        cached({}, make, dict)
    assert [path for path in folder.iterdir() if path.suffix != ".lock"] == []


@pytest.mark.parametrize("place", ["file", "~nosuchuser/x"])
def test_without_a_writable_cache_the_table_is_private(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setenv("PROMPTSHARD_CACHE", place)
    maker = Maker()
    assert list(maker.table()) == [Example.with_target((1, 2), 1, 0)]
    assert maker.made == 1


def test_old_tables_are_deleted(folder):
    maker = Maker()
    maker.table("old")
    maker.table("used")
    (old, used) = sorted(folder.glob("*/ids.npy"), key=lambda path: path.stat().st_mtime_ns)
    for path in folder.iterdir():
        os.utime(path, (0, 0))
    maker.table("used")
    maker.table("new")
    assert (old.exists(), used.exists()) == (False, True)
    assert len(list(folder.glob("*.lock"))) == 1


HOLDER = """
import sys
from trainer.data.token_cache import cached
from trainer.data.token_table import Example, TokenBlock
def make():
    yield TokenBlock.of([Example.with_target((1, 2), 1, 0)])
    print("writing", flush=True)
    sys.stdin.read()
cached({"of": "x"}, make, dict)
"""


def test_a_writer_that_dies_blocks_no_other_process(folder):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"writing\n"
    assert [path for path in folder.iterdir() if "writing" in path.name]
    holder.kill()
    holder.wait()
    maker = Maker()
    maker.table()
    assert maker.made == 1
    assert not [path for path in folder.iterdir() if "writing" in path.name]


def test_a_waiting_process_reads_the_other_process_table(folder):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    assert holder.stdin is not None
    assert holder.stdout.readline() == b"writing\n"
    waiter = subprocess.Popen(
        [sys.executable, "-c", HOLDER.replace("yield", "raise RuntimeError; yield")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    time.sleep(0.3)
    holder.stdin.close()
    assert holder.wait(30) == 0
    waiter.communicate(timeout=30)
    assert waiter.returncode == 0


def many_rows(folder: Path, texts: list[str]) -> RowDataset:
    path = folder / "many.jsonl"
    path.write_text("".join(json.dumps({"text": t, "label": "yes"}) + "\n" for t in texts))
    return load_rows(str(path), make_task())


def test_workers_give_what_one_process_gives(tmp_path, monkeypatch):
    texts = [" ".join("abcde"[: 1 + i % 5]) for i in range(2500)]
    task = make_task(too_long="truncate")
    rows = many_rows(tmp_path, texts)
    here = tokenize.tokenize(rows, task, make_tokenizer(), 8)
    monkeypatch.setattr(tokenize, "MANY_ROWS", 1)
    monkeypatch.setattr(worker_pool, "num_cores", lambda: 2)
    shown: list[int] = []

    class Shown:
        def __enter__(self) -> Any:
            return shown.append

        def __exit__(self, *_: object) -> None:
            pass

    def progress(what: str, total: int) -> Shown:
        assert (what, total) == (f"tokenizing {rows.path}", 2500)
        return Shown()

    made = tokenize.tokenize(rows, task, make_tokenizer(), 8, progress=progress)
    assert shown == [1000, 1000, 500]
    again = tokenize.tokenize(rows, task, make_tokenizer(), 8, progress=progress)
    assert shown == [1000, 1000, 500], "the second time it comes from the cache"
    for result in (made, again):
        assert list(result.examples) == list(here.examples)
        assert (result.skipped, result.truncated) == (here.skipped, here.truncated) == (0, 1000)


def test_settings_that_change_tokens_change_the_table(tmp_path, monkeypatch):
    rows = many_rows(tmp_path, ["a", "b c d e a"])
    monkeypatch.setattr(tokenize, "MANY_ROWS", 1)
    monkeypatch.setattr(worker_pool, "num_cores", lambda: 1)

    def ids(tokenizer: Any = None, length: int = 9, prefix: str = "", **settings: Any) -> Any:
        task = make_task(**{"too_long": "truncate", **settings})
        tables = tokenize.tokenize(rows, task, tokenizer or make_tokenizer(), length, prefix=prefix)
        return tuple(example.input_ids for example in tables.examples)

    tables = [
        ids(),
        ids(length=8),
        ids(prefix="c "),
        ids(append_eos=False),
        ids(input="{text}:"),
        ids(make_tokenizer("<s> <s> $A")),
    ]
    assert len(set(tables)) == len(tables)
    assert ids(metric="exact_match", hand_written=[], max_new_tokens=3) == tables[0]
    places = [path for path in cache_dir("tokens").iterdir() if path.is_dir()]
    assert len(places) == len(tables), "and nothing else does"


def test_problems_of_many_rows_read_as_those_of_few(tmp_path, monkeypatch):
    texts = ["a b c d e a b c" if i % 200 == 7 else "a" for i in range(2500)]
    rows, task = many_rows(tmp_path, texts), make_task()
    messages = []
    for many in (10**9, 1):
        monkeypatch.setattr(tokenize, "MANY_ROWS", many)
        monkeypatch.setattr(worker_pool, "num_cores", lambda: 1)
        with pytest.raises(BadInput) as caught:
            tokenize.tokenize(rows, task, make_tokenizer(), 8)
        messages.append(caught.value.problems)
    assert messages[0] == messages[1]
    (problem,) = messages[0]
    start = f"{tmp_path}/many.jsonl:8 and 12 more rows: has 13 tokens, 8 fit (context minus"
    assert problem.startswith(start)


def test_work_that_cannot_be_pickled_runs_in_this_process(monkeypatch):
    monkeypatch.setattr(worker_pool, "num_cores", lambda: 2)
    here = os.getpid()
    assert list(worker_pool.map_in_order(lambda n: (n, os.getpid()), [(1,), (2,)])) == [
        (1, here),
        (2, here),
    ]


def test_without_shared_memory_work_runs_in_this_process(monkeypatch):
    """Semaphores need a writable /dev/shm, which some containers lack."""

    def read_only(*_: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("_multiprocessing.SemLock", read_only)
    monkeypatch.setattr(worker_pool, "num_cores", lambda: 2)
    assert list(worker_pool.map_in_order(abs, [(-1,), (2,)])) == [1, 2]


def test_an_error_of_a_worker_is_raised_and_ends_the_others(monkeypatch):
    monkeypatch.setattr(worker_pool, "num_cores", lambda: 2)
    made = worker_pool.map_in_order(np.zeros, [(1,), (-1,), *[(2,)] * 50])
    assert next(made).tolist() == [0.0]
    with pytest.raises(ValueError, match="negative"):
        list(made)
