"""The wheels for a GPU machine: which packages, one library of bitsandbytes, the size limit."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from benchmarks import gpu_wheels


def test_what_the_machine_lacks_is_collected() -> None:
    names = gpu_wheels.missing(gpu_wheels.EXPECTED)
    assert {"bitsandbytes", "deepspeed", "hjson", "mlflow-skinny", "pydantic"} <= set(names)
    assert "annotated-types" in names, "a requirement of a requirement"
    assert "pydantic-core" in names
    assert not {"promptshard", "torch", "triton", "numpy", "transformers", "pytest"} & set(names)
    assert gpu_wheels.missing([*gpu_wheels.EXPECTED, *names]) == []


def bitsandbytes_wheel(folder: Path) -> Path:
    wheel = folder / "bitsandbytes-1-py3-none-manylinux_2_24_x86_64.whl"
    libraries = [f"bitsandbytes/libbitsandbytes_{n}.so" for n in ("cpu", "cuda128", "cuda130")]
    record = "".join(f"{name},sha256=x,9\n" for name in libraries)
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in libraries:
            archive.writestr(name, name)
        archive.writestr("bitsandbytes-1.dist-info/RECORD", record)
    return wheel


def test_one_cuda_library_is_kept(tmp_path: Path) -> None:
    wheel = bitsandbytes_wheel(tmp_path)
    gpu_wheels.keep_one_cuda(wheel, "130")
    with zipfile.ZipFile(wheel) as archive:
        kept = archive.namelist()[:-1]
        assert kept == [f"bitsandbytes/libbitsandbytes_{name}.so" for name in ("cpu", "cuda130")]
        assert archive.read(kept[1]) == kept[1].encode()
        record = archive.read("bitsandbytes-1.dist-info/RECORD").decode()
    assert [line.split(",")[0] for line in record.splitlines()] == kept
    assert list(tmp_path.iterdir()) == [wheel]


def test_a_cuda_version_without_library_is_refused(tmp_path: Path) -> None:
    wheel = bitsandbytes_wheel(tmp_path)
    with pytest.raises(SystemExit, match=r"no libbitsandbytes_cuda126\.so.*choose --cuda"):
        gpu_wheels.keep_one_cuda(wheel, "126")


def test_wheels_above_the_limit_or_for_another_python_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wheel = tmp_path / "a-1-py3-none-any.whl"
    wheel.write_bytes(bytes(20_000))
    assert gpu_wheels.report(tmp_path, limit=0.03) == 0
    assert gpu_wheels.report(tmp_path, limit=0.01) == 1
    assert "more than the limit of 0.01 MB" in capsys.readouterr().err
    wheel.rename(tmp_path / "deepspeed-1-cp311-cp311-linux_x86_64.whl")
    assert gpu_wheels.report(tmp_path, limit=1) == 1
    assert "built for this Python only: deepspeed-1-cp311" in capsys.readouterr().err
