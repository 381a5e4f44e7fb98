"""Find and check adapters that initialize other prompts (SPoT: Vu et al. 2021, arXiv 2110.07904).

Adapters are checked before the base model is loaded: their settings, and the header of the file of
weights. Imports no torch.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config import Init, RunConfig, resolve_path
from trainer.runtime.errors import BadInput
from trainer.runtime.json_file import parse_json, read_json_object

SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
#: Text of the prompt's segment whose embeddings are in the adapter too; see ``save_peft``.
SEGMENT = "segment.json"
#: The only tensor of an adapter, with one row per virtual token.
TENSOR = "prompt_embeddings"
#: PEFT types of adapters with virtual tokens, and with keys and values, in one layout each.
VIRTUAL_TOKENS = ("PROMPT_TUNING", "P_TUNING")
KEYS_AND_VALUES = ("PREFIX_TUNING", "CARTRIDGE")


@dataclass(frozen=True)
class PromptSource:
    """An adapter that can initialize a prompt.

    Attributes:
        prefix: the adapter has keys and values, not virtual tokens.
        num_virtual_tokens, width: its rows and columns; the width of virtual tokens is the base's
            hidden size.
    """

    folder: Path
    prefix: bool
    num_virtual_tokens: int
    width: int


def find_source(path: str) -> PromptSource:
    """Find the adapter in a folder, or the only one of a run's output folder.

    Raises:
        BadInput: there is none, more than one, or it has no prompt in safetensors.
    """
    folder = _adapter_folder(resolve_path(path))
    try:
        kind = read_json_object(folder / SETTINGS).get("peft_type")
    except BadInput as error:
        raise BadInput(
            [f"{problem}; export the prompt again" for problem in error.problems]
        ) from None
    if kind not in (*VIRTUAL_TOKENS, *KEYS_AND_VALUES):
        raise BadInput(
            f"{folder}: is an adapter of type {kind!r}, which has no prompt; known: "
            f"{', '.join((*VIRTUAL_TOKENS, *KEYS_AND_VALUES))}"
        )
    rows, width = _shape(folder)
    trained = trained_rows(folder, rows)
    return PromptSource(folder, kind in KEYS_AND_VALUES, trained.stop - trained.start, width)


def trained_rows(folder: Path, rows: int) -> slice:
    """Return which rows of an adapter are virtual tokens; others are embeddings of fixed text.

    Raises:
        BadInput: the record of the text is damaged or does not match the adapter.
    """
    if not (folder / SEGMENT).is_file():
        return slice(0, rows)
    segment = read_json_object(folder / SEGMENT)
    try:
        start = len(segment["before"])
        trained = slice(start, start + _size(segment["num_virtual_tokens"]))
        if trained.stop + len(segment["after"]) != rows or trained.stop == start:
            raise ValueError(f"it describes other than the {rows} rows of {WEIGHTS}")
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(
            f"{folder / SEGMENT}: is damaged ({type(error).__name__}: {error}); export the prompt "
            "again"
        ) from None
    return trained


def source_problems(config: RunConfig, hidden_size: int | None = None) -> Iterator[str]:
    """Yield the problems of the adapters that initialize prompts of a run file.

    ``hidden_size`` is that of the base, or None if unknown.
    """
    for prompt in config.prompts:
        if prompt.init.from_ is None:
            continue
        setting = f"prompts.{prompt.name}.init.from"
        try:
            source = find_source(prompt.init.from_)
        except BadInput as error:
            yield from (f"{setting}: {problem}" for problem in error.problems)
            continue
        if source.prefix != prompt.entry.trains_prefix:
            yield (
                f"{setting}: {source.folder} holds "
                f"{'keys and values' if source.prefix else 'virtual tokens'}, but the method is "
                f"{prompt.method}; use "
                f"{'prefix_tuning' if source.prefix else 'prompt_tuning or p_tuning'}, or name "
                "another prompt"
            )
        elif not source.prefix and hidden_size not in (None, source.width):
            yield (
                f"{setting}: {source.folder} holds virtual tokens of width {source.width}, but the "
                f"base has {hidden_size}; name a prompt of this base"
            )


def without_sources(config: RunConfig) -> RunConfig:
    """Remove ``init.from``: a resumed run does not read these adapters, which may not exist now."""
    prompts = [
        prompt
        if prompt.init.from_ is None
        else prompt.model_copy(update={"init": Init(vocab=True)})
        for prompt in config.prompts
    ]
    return config.model_copy(update={"prompts": prompts})


def check_sources(config: RunConfig, hidden_size: int) -> None:
    """Raise ``BadInput`` with all of ``source_problems``."""
    if problems := list(source_problems(config, hidden_size)):
        raise BadInput(problems)


def _adapter_folder(folder: Path) -> Path:
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder; give an adapter's folder or a run's output_dir")
    if (folder / SETTINGS).is_file():
        return folder
    adapters = sorted(path.parent for path in folder.glob(f"prompts/*/{SETTINGS}"))
    if len(adapters) == 1:
        return adapters[0]
    if adapters:
        names = ", ".join(path.name for path in adapters)
        raise BadInput(f"{folder}: has several prompts; name one: {folder}/prompts/NAME of {names}")
    raise BadInput(f"{folder}: has no {SETTINGS}, so it is not an adapter; train the prompt first")


def _shape(folder: Path) -> tuple[int, int]:
    """Read the shape of the adapter's tensor from the header of its weights file."""
    path, shapes = folder / WEIGHTS, tensor_shapes(folder)
    if TENSOR not in shapes:
        raise BadInput(f"{path}: has no tensor {TENSOR!r}, so it has no prompt")
    if len(shapes[TENSOR]) != 2:
        raise BadInput(f"{path}: is not a prompt: {TENSOR!r} has the shape {shapes[TENSOR]}")
    rows, width = shapes[TENSOR]
    if not rows:
        raise BadInput(f"{path}: has no virtual tokens")
    return rows, width


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Read the shapes of an adapter's tensors from the header of its weights file.

    Raises:
        BadInput: there are no weights in safetensors, or the file is damaged.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = any(folder.glob("adapter_model.bin"))
        remedy = "save it as safetensors: pickles can run code" if pickled else "train it first"
        raise BadInput(f"{folder}: has no {WEIGHTS}; {remedy}")
    try:
        with path.open("rb") as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = parse_json(file.read(min(size, 1 << 24)))
        header.pop("__metadata__", None)
        return {name: tuple(map(_size, entry["shape"])) for name, entry in header.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, struct.error) as error:
        raise BadInput(f"{path}: is not a valid safetensors file of an adapter: {error}") from None


def _size(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"its shape holds {value!r}")
    return value
