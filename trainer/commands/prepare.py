"""``promptshard prepare BASE OUT``: convert a base model to int8.

The output has the format of transformers and bitsandbytes: int8 weights and their row scales.
Tensors are converted in blocks of rows, so that a model may be larger than memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from huggingface_hub import ModelCardData
from torch import Tensor

from trainer.config import Base
from trainer.model.base_license import base_license
from trainer.model.base_tokenizer import CARD
from trainer.model.checkpoint_files import BaseFiles, open_base
from trainer.model.layers.quantization import quantize_rows
from trainer.model.meta_model import build_meta_model, locate_int8_parameters
from trainer.model.model_folder import INDEX, SINGLE
from trainer.model.safetensors_reader import SafetensorsReader, scales_name
from trainer.model.tensor_locations import BLOCK_BYTES, RowReader, TensorLocation
from trainer.runtime.console import Console
from trainer.runtime.errors import EXIT_BAD_INPUT, EXIT_DONE, BadInput
from trainer.runtime.json_file import read_json_object

#: Maximum size of a weight file, as on the hub.
FILE_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Entry:
    """A tensor of a new folder: its header entry, and the function that writes its data."""

    name: str
    type: str
    shape: tuple[int, ...]
    num_bytes: int
    write: Callable[[BinaryIO], None]

    @property
    def alignment(self) -> int:
        """Bytes of an element."""
        return self.num_bytes // max(1, torch.Size(self.shape).numel())


def prepare(
    settings: Base, out: Path, console: Console, file_bytes: int = FILE_BYTES
) -> tuple[int, int]:
    """Write ``out`` and return the bytes of the weights before and after.

    Raises:
        BadInput: the base model cannot be loaded or is in int8 already, or ``out`` exists.
    """
    if out.exists():
        raise BadInput(f"{out}: already exists; use a new folder")
    with console.downloading(settings.model) as progress:
        files = open_base(settings, progress=progress)
    for warning in files.parameters.warnings:
        console.warn(warning)
    stored_int8 = [name for name in files.tensors if scales_name(name) in files.tensors]
    if stored_int8:
        raise BadInput(
            f"base.model: {settings.model!r} is in 8 bits already ({stored_int8[0]!r} has scales); "
            "it can be used as base.model directly"
        )
    quantized = _quantized_tensors(files, settings)
    writing = out.with_name(f".{out.name}.writing")
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)
    try:
        with (
            console.loading(f"quantizing {settings.model}", files.num_bytes) as bar,
            SafetensorsReader(files.tensors, bar.advance) as reader,
        ):
            entries: list[Entry] = []
            for name in sorted(files.tensors.keys() - {files.parameters.duplicate}):
                if name in quantized:
                    entries += _quantized_entries(reader, name, quantized[name])
                else:
                    entries.append(_copied_entry(reader, name))
            size = write_weights(writing, entries, file_bytes)
        _write_other_files(files, settings, writing)
        os.replace(writing, out)
    except BaseException:
        shutil.rmtree(writing, ignore_errors=True)
        raise
    return files.num_bytes, size


def _quantized_tensors(files: BaseFiles, settings: Base) -> dict[str, TensorLocation]:
    """Return the stored tensors that a run would quantize, each with its own location."""
    model = build_meta_model(files, settings, torch.float32, torch.device("cpu"))
    return {
        tensor: TensorLocation((tensor,), location.as_int8().stored_shape, location.transposed)
        for location in locate_int8_parameters(model, files).values()
        for tensor in location.tensors
    }


def _quantized_entries(
    reader: SafetensorsReader, name: str, location: TensorLocation
) -> Iterator[Entry]:
    """Yield weight, row scales and layout (0: by rows) of a tensor, named as in bitsandbytes."""
    absmax = torch.zeros(location.shape[:-1].numel())

    def write_weight(file: BinaryIO) -> None:
        for rows, values in RowReader(location, reader).blocks():
            weight, absmax[rows] = quantize_rows(values)
            _write(file, weight)

    rows, layout = tuple(location.shape[:-1]), torch.zeros(1, dtype=torch.uint8)
    yield Entry(name, "I8", tuple(location.shape), location.shape.numel(), write_weight)
    yield Entry(scales_name(name), "F32", rows, absmax.nbytes, lambda file: _write(file, absmax))
    if name.endswith(".weight"):
        yield Entry(f"{name}_format", "U8", (), 1, lambda file: _write(file, layout))


def _copied_entry(reader: SafetensorsReader, name: str) -> Entry:
    """A tensor in its stored type; in fp32 if it is in a quantized format."""
    stored = reader.tensors[name]
    if stored.encoding:
        location = TensorLocation((name,), torch.Size(stored.shape))

        def decode(file: BinaryIO) -> None:
            for _, values in RowReader(location, reader).blocks():
                _write(file, values)

        return Entry(name, "F32", stored.shape, 4 * location.shape.numel(), decode)

    def copy(file: BinaryIO) -> None:
        for start in range(0, stored.num_bytes, BLOCK_BYTES):
            _write(file, reader.read_bytes(name, start, min(start + BLOCK_BYTES, stored.num_bytes)))

    return Entry(name, stored.type, stored.shape, stored.num_bytes, copy)


def write_weights(folder: Path, entries: list[Entry], file_bytes: int) -> int:
    """Write entries in order to weight files of at most ``file_bytes``; return their bytes."""
    parts: list[list[Entry]] = [[]]
    for entry in entries:
        filled = sum(other.num_bytes for other in parts[-1])
        if parts[-1] and filled + entry.num_bytes > file_bytes:
            parts.append([])
        parts[-1].append(entry)
    names = [SINGLE]
    if len(parts) > 1:
        names = [f"model-{i:05d}-of-{len(parts):05d}.safetensors" for i in range(1, len(parts) + 1)]
        index = {
            "metadata": {"total_size": sum(entry.num_bytes for entry in entries)},
            "weight_map": {
                entry.name: name for name, part in zip(names, parts, strict=True) for entry in part
            },
        }
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    for name, part in zip(names, parts, strict=True):
        _write_file(folder / name, part)
    return sum((folder / name).stat().st_size for name in names)


def _write_file(path: Path, entries: list[Entry]) -> None:
    """Write a safetensors file (https://github.com/huggingface/safetensors#format) in blocks."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begins: dict[str, int] = {}
    end = 0
    # Tensors are placed by decreasing element size, so that each is aligned, but written in the
    # given order, because row scales are computed while their weight is written.
    for entry in sorted(entries, key=lambda entry: -entry.alignment):
        begins[entry.name], end = end, end + entry.num_bytes
        header[entry.name] = {
            "dtype": entry.type,
            "shape": list(entry.shape),
            "data_offsets": [begins[entry.name], end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        start = file.tell()
        for entry in entries:
            file.seek(start + begins[entry.name])
            entry.write(file)
        file.flush()
        os.fsync(file.fileno())
    assert path.stat().st_size == start + end


def _write(file: BinaryIO, tensor: Tensor) -> None:
    file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)


def _write_other_files(files: BaseFiles, settings: Base, out: Path) -> None:
    if files.folder.is_file():  # a GGUF file contains config and tokenizer
        for part in (files.config, files.tokenizer, files.generation):
            part.save_pretrained(out)
        if license := base_license(settings, files.folder):
            header = ModelCardData(**license.fields()).to_yaml()
            text = f"Converted to int8 from `{files.folder.name}` by promptshard prepare."
            (out / CARD).write_text(f"---\n{header}\n---\n\n{text}\n", encoding="utf-8")
    for path in files.small_files("*"):
        weights = path.suffix in (".safetensors", ".bin", ".pt", ".h5") or path.name == INDEX
        if path.is_file() and not weights and not path.name.startswith("."):
            shutil.copyfile(path, out / path.name)
    config = read_json_object(out / "config.json")
    config["quantization_config"] = {
        "quant_method": "bitsandbytes",
        "load_in_8bit": True,
        "load_in_4bit": False,
        "llm_int8_threshold": 0.0,
        "llm_int8_skip_modules": None if settings.head == "int8" else ["lm_head", "embed_out"],
    }
    if files.parameters.separate:  # the head differs from the embeddings
        for section in (config, config.get("text_config")):
            if isinstance(section, dict):
                section["tie_word_embeddings"] = False
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(prog="promptshard prepare")
    parser.add_argument("model", metavar="base")
    parser.add_argument("out", type=Path)
    parser.add_argument("--revision")
    parser.add_argument("--embeddings", default="keep", choices=("keep", "int8"))
    parser.add_argument("--head", default="keep", choices=("keep", "int8"))
    arguments = vars(parser.parse_args())
    out = arguments.pop("out")
    console = Console(sys.stdout, sys.stderr)
    try:
        before, after = prepare(Base.model_validate(arguments), out, console)
    except BadInput as error:
        for problem in error.problems:
            console.error(problem)
        return EXIT_BAD_INPUT
    except OSError as error:
        console.error(f"{out}: cannot be written: {error.strerror}")
        return EXIT_BAD_INPUT
    console.print(
        f"{out}: {after / 1e6:,.1f} MB in 8 bits, from {before / 1e6:,.1f} MB; "
        f"use it as base.model: {out}"
    )
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())
