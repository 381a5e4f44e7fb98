"""Collect the wheels that ``make gpu-check`` needs on a GPU machine without network.

    make gpu-wheels
    python -m benchmarks.gpu_wheels [--have FILE] [--out build/gpu-wheels] [--limit 55]

For Python 3.12 on x86-64 Linux, with the versions of constraints.txt. The machine is expected to
have PyTorch with CUDA, transformers and what usually is beside them (``EXPECTED``), or what FILE
lists: the output of its ``pip list --format=freeze``. DeepSpeed has no wheel on PyPI and is built
here. The wheel of bitsandbytes holds a library for each version of CUDA; only one is kept. On the
machine, in a copy of the repository:

    python3 -m pip install --no-index --no-deps --target /tmp/site build/gpu-wheels/*.whl
    PYTHONPATH=/tmp/site python3 -m benchmarks.gpu_check
"""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import subprocess
import sys
import zipfile
from collections.abc import Collection, Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
#: Large packages of the machine, and what is common there. Small ones are carried, in the tested
#: versions, even if the machine may have them.
EXPECTED = (
    *(
        "accelerate",
        "aiohttp",
        "huggingface-hub",
        "jinja2",
        "matplotlib",
        "ninja",
        "numpy",
        "packaging",
    ),
    *("pandas", "pillow", "protobuf", "psutil", "py-cpuinfo", "pyarrow", "pytest"),
    *("pytest-timeout", "pytest-xdist", "pyyaml", "requests", "rich", "safetensors"),
    *("scikit-learn", "scipy", "tokenizers", "torch", "tqdm", "transformers", "typer"),
    "typing-extensions",
)
#: What the check imports: promptshard's libraries, and the kernels that it compares with.
EXTRAS = ("bitsandbytes", "hub")
ENVIRONMENT = {
    "python_version": "3.12",
    "python_full_version": "3.12.0",
    "sys_platform": "linux",
    "platform_system": "Linux",
    "platform_machine": "x86_64",
    "os_name": "posix",
    "implementation_name": "cpython",
    "platform_python_implementation": "CPython",
}
#: Released as source only.
BUILT_HERE = ("deepspeed",)
#: pip accepts exactly the named versions of glibc.
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (5, 12, 17, 24, 26, 27, 28, 31, 34, 35)]
PLATFORMS += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"]
CUDA_LIBRARY = re.compile(r"libbitsandbytes_(?:cuda|rocm|xpu)\w*\.so$")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_wheels",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--have", type=Path, help="packages of the machine, one NAME==VERSION each")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-wheels")
    parser.add_argument("--limit", type=float, default=55, help="megabytes in all (default: 55)")
    parser.add_argument("--cuda", default="13.0", help="of the machine's torch (default: 13.0)")
    given = parser.parse_args(arguments)
    have: Collection[str] = EXPECTED
    if given.have is not None:
        try:
            have = re.findall(r"^([\w.-]+)\s*(?:==|@)", given.have.read_text(), re.MULTILINE)
        except OSError as error:
            parser.error(f"--have: {error}")
    given.out.mkdir(parents=True, exist_ok=True)
    for old in given.out.glob("*.whl"):
        old.unlink()
    names = missing(have)
    print(f"collecting {len(names)} packages into {given.out}: {', '.join(names)}", flush=True)
    if code := collect(names, given.out):
        return code
    for wheel in given.out.glob("bitsandbytes-*.whl"):
        keep_one_cuda(wheel, given.cuda.replace(".", ""))
    return report(given.out, given.limit)


def missing(have: Collection[str]) -> list[str]:
    """Return the required packages that are not in ``have``, by this environment's metadata."""
    present = {canonicalize_name(name) for name in have}
    roots = [("promptshard", extra) for extra in ("", *EXTRAS)]
    return sorted(requirements(roots, present) - {"promptshard"})


def requirements(roots: Sequence[tuple[str, str]], present: Collection[str]) -> set[str]:
    """Return what packages with an extra (or "") require, directly and indirectly.

    Packages in ``present`` are left out, and their requirements are not followed.
    """
    waiting, seen = list(roots), set(roots)
    while waiting:
        name, extra = waiting.pop()
        try:
            texts = importlib.metadata.requires(name) or ()
        except importlib.metadata.PackageNotFoundError:  # such as CUDA's packages
            continue
        for requirement in map(Requirement, texts):
            needed = canonicalize_name(requirement.name)
            marker = requirement.marker
            if needed in present or (
                marker is not None and not marker.evaluate(ENVIRONMENT | {"extra": extra})
            ):
                continue
            new = {(needed, inner) for inner in ("", *requirement.extras)} - seen
            seen |= new
            waiting += new
    return {name for name, _ in seen - set(roots)}


def collect(names: Sequence[str], out: Path) -> int:
    """Download the wheels, and build those that are not released as one; return pip's exit code."""
    pins = [f"{name}=={importlib.metadata.version(name)}" for name in names]
    built = [pin for pin in pins if pin.split("==")[0] in BUILT_HERE]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    options = ["--no-deps", "-q", "--progress-bar", "off"]
    download = [*pip, "download", *options, "-d", str(out), "--only-binary=:all:"]
    download += ["--python-version", "3.12", "--implementation", "cp"]
    for platform in PLATFORMS:
        download += ["--platform", platform]
    code = subprocess.call([*download, *(pin for pin in pins if pin not in built)])
    if code or not built:
        return code
    return subprocess.call(
        [*pip, "wheel", *options, "--no-build-isolation", "-w", str(out), *built]
    )


def keep_one_cuda(wheel: Path, version: str) -> None:
    """Remove the libraries of bitsandbytes for other accelerators than CUDA ``version`` (130).

    Raises:
        SystemExit: if the wheel has no library for this version.
    """
    kept = f"libbitsandbytes_cuda{version}.so"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        libraries = [name for name in names if CUDA_LIBRARY.search(name)]
        if not any(name.endswith(kept) for name in libraries):
            sys.exit(f"{wheel.name} has no {kept}, only {', '.join(libraries)}; choose --cuda")
        removed = {name for name in libraries if not name.endswith(kept)}
        smaller = wheel.with_suffix(".part")
        with zipfile.ZipFile(smaller, "w", zipfile.ZIP_DEFLATED) as target:
            for name in names:
                if name in removed:
                    continue
                data = archive.read(name)
                if name.endswith(".dist-info/RECORD"):
                    lines = data.decode().splitlines(keepends=True)
                    data = "".join(li for li in lines if li.split(",")[0] not in removed).encode()
                target.writestr(name, data)
    smaller.replace(wheel)


def report(out: Path, limit: float) -> int:
    """Print the sizes; return 1 if the wheels must not be used.

    That is, if the sum is above ``limit`` megabytes, or a wheel built here is for this Python only.
    """
    sizes = {wheel.name: wheel.stat().st_size for wheel in out.glob("*.whl")}
    for name, size in sorted(sizes.items(), key=lambda item: -item[1]):
        print(f"{size / 1e6:8.2f} MB  {name}")
    total = sum(sizes.values()) / 1e6
    print(f"{total:8.2f} MB  {len(sizes)} wheels in {out}")
    built = [name for name in sizes if name.split("-")[0] in BUILT_HERE]
    foreign = [name for name in built if not name.endswith("-none-any.whl")]
    if foreign:
        print(f"error: built for this Python only: {', '.join(foreign)}", file=sys.stderr)
    if total > limit:
        print(
            f"error: {total:.1f} MB are more than the limit of {limit:g} MB; name the packages of "
            "the machine with --have FILE, or raise --limit",
            file=sys.stderr,
        )
    return int(bool(foreign) or total > limit)


if __name__ == "__main__":
    sys.exit(main())
