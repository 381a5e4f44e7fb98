"""``promptshard init --train FOLDER``: splits of saved data sets and of copies of the hub's."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet
from typer.testing import CliRunner

from launch import preflight
from launch.commands import app
from trainer.config import load
from trainer.data.splits import load_rows
from trainer.runtime.errors import BadInput

ROWS = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(40)]


def init(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["init", "classify", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def write(*paths: str) -> None:
    """Write rows to files, whose text names the file."""
    for path in paths:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        rows = [row | {"text": f"{path} {row['text']}"} for row in ROWS]
        if path.endswith(".parquet"):
            parquet.write_table(pa.Table.from_pylist(rows), path)
        else:
            Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def sources() -> list[str]:
    """Check the run file and its rows; return the sources of its train and validation rows."""
    (task,) = preflight.check_run("classify.yaml", []).tasks
    return [
        f"{source.path}{f' {source.split}' if source.split else ''}"
        for source in [*task.train, *(task.validation or [])]
    ]


def save(folder: str, *splits: str) -> None:
    saved = {
        split: datasets.Dataset.from_list(
            [row | {"text": f"{split} {row['text']}"} for row in ROWS]
        )
        for split in splits
    }
    datasets.DatasetDict(saved).save_to_disk(folder)


@pytest.mark.parametrize(
    ("splits", "validation"),
    [
        (("train", "test", "validation"), "saved validation"),
        (("train", "test"), "saved test"),
        (("test", "train", "dev"), "saved dev"),
    ],
)
def test_splits_of_a_saved_folder_are_validation_rows(splits, validation, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save("saved", *splits)
    split = validation.split()[1]
    assert f"note: validation rows are those of the split {split} in saved" in (
        init("--train", "saved")
    )
    assert sources() == ["saved", validation]
    (task,) = load("classify.yaml").tasks
    assert load_rows(task.validation or "", task)[0]["text"].startswith(split)
    init("--train", "saved", "--validation", "saved/test", "--force")
    assert sources() == ["saved", "saved/test"], "an option wins"


def test_rows_without_labels_are_not_for_validation(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("kaggle/train.csv", "kaggle/sample_submission.jsonl")
    text = "".join(f"{row['text']},{row['label']}\n" for row in ROWS)
    Path("kaggle/train.csv").write_text("text,label\n" + text)
    Path("kaggle/test.csv").write_text("text\na\n")
    shown = init("--train", "kaggle")
    assert "test in kaggle is not used for validation: it has no column 'label'\n" in shown
    assert sources() == ["kaggle/train.csv"]
    label = datasets.ClassLabel(names=["a", "b"])
    features = datasets.Features({"text": datasets.Value("string"), "label": label})
    labels = {"train": [0, 1] * 20, "test": [-1] * 40}
    saved = {
        split: datasets.Dataset.from_list(
            [{"text": f"{split} {i}", "label": label} for i, label in enumerate(values)], features
        )
        for split, values in labels.items()
    }
    datasets.DatasetDict(saved).save_to_disk("glue")
    shown = init("--train", "glue", "--force")
    assert "the split test in glue is not used for validation: glue/test/" in shown
    assert "-1 is not one of its 2 classes" in shown
    assert sources() == ["glue"]


def test_a_saved_folder_with_other_splits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save("one", "train_sft", "test_sft", "train_gen", "test_gen")
    with pytest.raises(BadInput) as caught:
        init("--train", "one")
    problem, command = str(caught.value).split(": promptshard init classify ")
    assert problem == (
        "--train: one: has 2 splits to train on: train_sft, train_gen; name the rows of one"
    )
    init(*shlex.split(command))
    assert sources() == ["one/train_sft", "one/test_sft"]
    save("two", "a", "b")
    with pytest.raises(BadInput, match=r"has no split 'train'; it has a, b: .* --train two/a"):
        init("--train", "two", "--force")


CLONES = {
    "shards": (
        ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"],
        ["data/validation-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"],
        ["data/train-*.parquet", "data/validation-00000-of-00001.parquet"],
    ),
    "other shards": (
        ["data/train_sft-00000-of-00001.parquet", "data/test_sft-00000-of-00001.parquet"],
        ["data/test_gen-00000-of-00001.parquet"],
        ["data/train_sft-00000-of-00001.parquet", "data/test_sft-00000-of-00001.parquet"],
    ),
    "files": (["train.jsonl"], ["dev.jsonl"], ["train.jsonl", "dev.jsonl"]),
    "words in names": (
        ["my-train_v2.jsonl", "trainer.jsonl"],
        ["my-test.v2.jsonl"],
        ["my-train_v2.jsonl", "my-test.v2.jsonl"],
    ),
    "folders": (
        ["default/train/0000.parquet", "default/train/0001.parquet"],
        ["default/test/0000.parquet"],
        ["default/train/*.parquet", "default/test/0000.parquet"],
    ),
    "two formats": (["train.jsonl", "train.parquet"], [], ["train.parquet"]),
    "folders in a split": (["train/x/1.jsonl", "train/y/1.jsonl"], [], ["train/**/*.jsonl"]),
    "files without a glob": (
        ["train_1.jsonl", "1-train.jsonl"],
        ["other.jsonl"],
        ["1-train.jsonl", "train_1.jsonl"],
    ),
    "one file": (["rows.jsonl"], [], ["rows.jsonl"]),
}


@pytest.mark.parametrize(("train", "others", "expected"), CLONES.values(), ids=CLONES)
def test_splits_of_a_clone_are_found(train, others, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(*(f"clone$/{name}" for name in [*train, *others, ".cache/train.jsonl"]))
    Path("clone$/README.md").write_text("---\nlicense: mit\n---\n# Rows\n")
    Path("clone$/dataset_infos.json").write_text("{}")
    init("--train", "clone$")
    assert sources() == [f"clone$/{name}" for name in expected]


README = """---
configs:
- config_name: default
  default: true
  data_files:
  - split: train
    path: main/*.jsonl
  - split: test
    path: [held_out.jsonl, ../outside.jsonl, ABSOLUTE]
size_categories: 10K<n<100K
---
"""


def test_the_header_of_the_readme_names_splits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("clone/main/a.jsonl", "clone/main/b.jsonl", "clone/held_out.jsonl", "clone/train.jsonl")
    write("outside.jsonl")
    Path("clone/README.md").write_text(README.replace("ABSOLUTE", str(tmp_path / "outside.jsonl")))
    init("--train", "clone")
    assert sources() == ["clone/main/*.jsonl", "clone/held_out.jsonl"]


@pytest.mark.parametrize("has_readme", [True, False])
def test_several_configurations_are_listed_with_a_command(has_readme, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(
        *("my clone/en/train-0.jsonl", "my clone/en/train-1.jsonl", "my clone/en/test.jsonl"),
        *("my clone/fr/train.jsonl", "my clone/ax/test.jsonl"),
    )
    if has_readme:
        files = [("en", "en/train*"), ("fr", "fr/train.jsonl"), ("gone", "none.jsonl")]
        configs = [{"config_name": name, "data_files": path} for name, path in files]
        configs[0]["data_files"] = [
            {"split": "train", "path": "en/train*"},
            {"split": "test", "path": "en/test.jsonl"},
        ]
        Path("my clone/README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    with pytest.raises(BadInput) as caught:
        init("sub/mine.yaml", "--train", "my clone", "--model", "meta/m")
    assert str(caught.value) == (
        "--train: my clone: has 2 configurations: en, fr; name the rows of one: promptshard init "
        "classify sub/mine.yaml --train 'my clone/en/train-*.jsonl' --validation "
        "'my clone/en/test.jsonl' --model meta/m"
    )
    init("--train", "my clone/en/train-*.jsonl", "--validation", "my clone/en/test.jsonl")
    assert sources() == ["my clone/en/train-*.jsonl", "my clone/en/test.jsonl"]
    init("--train", "my clone/fr", "--force")
    assert sources() == ["my clone/fr/train.jsonl"]


def test_other_words_in_names_are_configurations(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("data/en_train.jsonl", "data/en_dev.jsonl", "data/fr_train_0.jsonl", "data/README.json")
    write("data/fr_train_1.jsonl", "data/fr_dev.jsonl")
    with pytest.raises(BadInput) as caught:
        init("--train", "data")
    assert str(caught.value) == (
        "--train: data: has 2 configurations: en, fr; name the rows of one: promptshard init "
        "classify --train data/en_train.jsonl --validation data/en_dev.jsonl"
    )
    write("one/squad_train.jsonl", "one/dev_set.jsonl")
    init("--train", "one")
    assert sources() == ["one/squad_train.jsonl", "one/dev_set.jsonl"]


def test_a_folder_without_splits_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("clone/cats.jsonl", "clone/dogs.jsonl")
    with pytest.raises(BadInput, match=r"clone: is a folder; .* holds cats.jsonl, dogs.jsonl"):
        init("--train", "clone")
    write("deep/data/train.jsonl", "deep/data/test.jsonl")
    init("--train", "deep")
    with pytest.raises(BadInput, match=r"its rows to train on are deep/data/train\.jsonl"):
        preflight.check_run("classify.yaml", ["tasks[0].train=deep"])


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Data sets of a folder stand for those of the hub, which is not asked."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # else: many tries


def hub_sources() -> list[dict[str, str]]:
    (task,) = preflight.check_run("classify.yaml", []).tasks
    sources = [*task.train, *(task.validation or [])]
    return [source.model_dump(exclude_none=True) for source in sources]


def test_splits_of_the_hub_are_validation_rows(hub):
    write("org/good/train.jsonl", "org/good/validation.jsonl", "org/good/test.jsonl")
    assert "split validation in hf://org/good" in init("--train", "hf://org/good")
    assert hub_sources() == [{"hub": "org/good"}, {"hub": "org/good", "split": "validation"}]
    write(*(f"org/sft/data/{name}-00000-of-00001.parquet" for name in ("train_sft", "test_sft")))
    write("org/sft/data/train_gen-00000-of-00001.parquet")
    shown = init("--train", "hf://org/sft", "--force")
    assert "note: train rows are those of the split train_sft; others: train_gen" in shown
    assert hub_sources() == [
        {"hub": "org/sft", "split": "train_sft"},
        {"hub": "org/sft", "split": "test_sft"},
    ]


def test_a_configuration_of_the_hub_is_named(hub):
    write("org/two/a/train.jsonl", "org/two/b/train.jsonl")
    configs = [{"config_name": name, "data_files": f"{name}/*.jsonl"} for name in "ab"]
    Path("org/two/README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    with pytest.raises(BadInput) as caught:
        init("--train", "hf://org/two")
    assert str(caught.value) == (
        "--train: hf://org/two: has several configurations: ['a', 'b']; name one as "
        "hf://org/two/NAME"
    )
    for address in ("hf://org/two/b", "hf://datasets/org/two/b/"):
        init("--train", address, "--force")
    assert hub_sources() == [{"hub": "org/two", "name": "b"}]


def test_a_pointer_of_git_lfs_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("clone").mkdir()
    Path("clone/train.parquet").write_text("version https://git-lfs.github.com/spec/v1\noid sha")
    with pytest.raises(
        BadInput, match=r"train\.parquet: is a pointer of Git LFS, not the data; run"
    ):
        init("--train", "clone")
