"""Compare the tokenizer class of transformers with ``tokenizer.json``. Imports no torch.

transformers builds some tokenizers from their class and vocabulary, and then ignores rules in
``tokenizer.json``. Other programs, such as inference servers, may follow the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

FILE_NAME = "tokenizer.json"
#: Texts on which families differ: digits, white space, contractions, accents, other scripts.
PROBES = (
    "Hello, world! It's 12345 of 2024-11-28.",
    "  two  spaces\n\nand\ta tab \n",
    "Crème brûlée, ﬁne, DON'T, x²; 東京 Привет 🙂",
    "def f(x):\n    return x[1:-1] != 0.5e-10",
)


def class_warning(tokenizer: Any, folder: Path) -> str | None:
    """Return a warning if a tokenizer gives other tokens than the file beside it, else None."""
    path = folder / FILE_NAME
    if not path.is_file():
        return None
    try:
        stored = Tokenizer.from_file(str(path))
    except Exception:  # transformers has read the folder in another way
        return None
    stored.no_padding()
    stored.no_truncation()
    for probe in PROBES:
        ours = list(tokenizer(probe, add_special_tokens=False, verbose=False)["input_ids"])
        theirs = stored.encode(probe, add_special_tokens=False).ids
        if ours != theirs:
            a, b = _apart(ours, theirs)
            return (
                f"base.model: transformers' class {type(tokenizer).__name__} reads {probe!r} as "
                f"{_tokens(tokenizer, a)}, but {FILE_NAME} as {_tokens(tokenizer, b)}; rows are "
                "read as the class reads them, so serve the prompt with transformers' tokenizer"
            )
    return None


def _apart(ours: list[int], theirs: list[int]) -> tuple[list[int], list[int]]:
    """Return the first few tokens from where two lists differ."""
    pairs = enumerate(zip(ours, theirs, strict=False))
    same = next((i for i, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
    return ours[same : same + 6], theirs[same : same + 6]


def _tokens(tokenizer: Any, ids: list[int]) -> str:
    names = tokenizer.convert_ids_to_tokens(ids)
    return f"{' '.join(map(str, names)) or 'no more tokens'} {ids}"
