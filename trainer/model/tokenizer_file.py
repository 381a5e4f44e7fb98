"""Read ``tokenizer.json`` and ``config.json`` of the base within milliseconds.

Imports neither torch nor transformers. The files are read from the model's folder or the cache of
the hub; nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from trainer.config import Base, resolve_path
from trainer.runtime.errors import BadInput
from trainer.runtime.json_file import read_json_object

#: Settings of ``config.json`` that limit the context; a base has one of them.
CONTEXT_SETTINGS = ("max_position_embeddings", "seq_length", "max_seq_len")


def token_ends(base: Base) -> Callable[[str], Sequence[int]] | None:
    """Return a function from a text to the ends of its tokens; None without ``tokenizer.json``."""
    path = _file(base, "tokenizer.json")
    if path is None:
        return None
    from tokenizers import Tokenizer  # only where there is a file

    tokenizer = Tokenizer.from_file(str(path))

    def ends(text: str) -> list[int]:
        return [end for _, end in tokenizer.encode(text, add_special_tokens=False).offsets]

    return ends


def longest_context(base: Base) -> int | None:
    """Return a context length that the base does not exceed; None if it is not known."""
    path = _file(base, "config.json")
    if path is None:
        return None
    try:
        config = read_json_object(path)
    except BadInput:
        return None
    text = config.get("text_config")
    values = [(text if isinstance(text, dict) else config).get(name) for name in CONTEXT_SETTINGS]
    return max((value for value in values if isinstance(value, int)), default=None)


def _file(base: Base, name: str) -> Path | None:
    path = resolve_path(base.model) / name
    if path.is_file():
        return path
    return None if path.parent.exists() else _cached(base, name)


def _cached(base: Base, name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        path = try_to_load_from_cache(base.model, name, revision=base.revision)
    except HFValidationError:
        return None
    return Path(path) if isinstance(path, str) else None
