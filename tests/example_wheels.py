"""Stand-ins for the packages of ``promptshard example smollm2``: a tiny model and a few rows."""

from __future__ import annotations

import csv
import hashlib
import io
import zipfile
from dataclasses import replace
from pathlib import Path

from launch import smollm2_example
from launch.example_packages import Package

REVIEW = '"It isn&#039;t  good,\nbut {}."'


def write_wheel(folder: Path, package: Package, files: dict[str, bytes]) -> Package:
    """Write a wheel that pip accepts; return the package with its digest."""
    name = package.wheel.split("-")[0]
    about = f"{name}-{package.version}.dist-info"
    files = files | {
        f"{name}/__init__.py": b"raise SystemExit('imported')\n",
        f"{about}/METADATA": (
            f"Metadata-Version: 2.1\nName: {package.name}\nVersion: {package.version}\n"
        ).encode(),
        f"{about}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{about}/RECORD": b"",
    }
    path = folder / package.wheel
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in files.items():
            archive.writestr(member, content)
    return replace(package, sha256=hashlib.sha256(path.read_bytes()).hexdigest())


def write_reviews(folder: Path, train: int = 60, validation: int = 12) -> Package:
    """Write a wheel with reviews; the last one of both splits is the same."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as tables:
        for split, count in (("train", train), ("validation", validation)):
            last = [("ends", "Acne", "positive")]
            reviews = [*_reviews(split, count - 1), *last]
            tables.writestr(smollm2_example.SPLITS[split], _table(reviews))
    files = {smollm2_example.TABLES: content.getvalue()}
    return write_wheel(folder, smollm2_example.REVIEWS, files)


def _reviews(split: str, count: int) -> list[tuple[str, str, str]]:
    ratings = ("positive", "negative", "neutral")
    conditions = ("Pain", "Acne", "Gout", "Depression")
    return [(f"{split} {i}", conditions[i % 4], ratings[i % 3]) for i in range(count)]


def _table(reviews: list[tuple[str, str, str]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t")
    writer.writerow(["", "drugName", "condition", "review", "rating"])
    for number, (words, condition, rating) in enumerate(reviews):
        drug = "a new drug" if words.startswith("validation") and number % 3 == 2 else "a drug"
        writer.writerow([number, drug, condition, REVIEW.format(words), rating])
    return text.getvalue()
