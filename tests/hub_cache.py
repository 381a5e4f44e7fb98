"""Create a model cache in huggingface_hub's layout, without a hub."""

from __future__ import annotations

from pathlib import Path

TINY = Path(__file__).resolve().parents[1] / "examples" / "tiny_base"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def fill_cache(cache: Path, name: str = "org/tiny", base: Path = TINY) -> Path:
    """Put a model into a cache; return the folder of its commit."""
    repository = cache / f"models--{name.replace('/', '--')}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "snapshots").mkdir()
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir()
    for file in base.iterdir():
        (snapshot / file.name).symlink_to(file)
    return snapshot
