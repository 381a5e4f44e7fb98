"""Answer a text with a soft prompt in llama.cpp. Written by ``promptshard export --to llama-cpp``.

    python llama_cpp_example.py MODEL.gguf "text"

Needs llama-cpp-python. The text fills the template of the task. Instead of a text, JSON of an
object with the columns of the template, or of a list of messages.
"""

from __future__ import annotations

import argparse
import array
import ctypes
import sys
from pathlib import Path
from typing import Any

from prompt_stream import PromptStream, parse_request


def read_rows(stream: PromptStream) -> ctypes.Array[ctypes.c_float]:
    """Read the virtual tokens [virtual tokens * hidden size] of ``virtual_tokens.f32``."""
    numbers = array.array("f", (stream.folder / "virtual_tokens.f32").read_bytes())
    if sys.byteorder != "little":
        numbers.byteswap()
    size = stream.settings["num_virtual_tokens"] * stream.settings["hidden_size"]
    if len(numbers) != size:
        raise SystemExit(f"virtual_tokens.f32 has {len(numbers)} numbers instead of {size}")
    return (ctypes.c_float * size)(*numbers)


def decode_input(llama: Any, context: Any, stream: PromptStream, ids: list[int], at: int) -> None:
    """Read an input: the ids before the virtual tokens, these, and the ids after them."""

    def tokens(some: list[int]) -> None:
        if some:
            batch = llama.llama_batch_get_one((ctypes.c_int32 * len(some))(*some), len(some))
            check(llama.llama_decode(context, batch))

    rows = read_rows(stream)
    embeddings = llama.llama_batch(
        n_tokens=stream.settings["num_virtual_tokens"],
        token=None,
        embd=ctypes.cast(rows, ctypes.POINTER(ctypes.c_float)),
        pos=None,
        n_seq_id=None,
        seq_id=None,
        logits=None,
    )
    tokens(ids[:at])
    check(llama.llama_decode(context, embeddings))
    tokens(ids[at:])


def check(code: int) -> None:
    if code:
        raise SystemExit(f"llama_decode failed with code {code}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("request")
    given = parser.parse_args()
    stream = PromptStream()
    try:
        ids, place = stream.ids(parse_request(given.request))
    except ValueError as error:
        raise SystemExit(str(error)) from None
    import llama_cpp as llama

    llama.llama_backend_init()
    options = llama.llama_context_default_params()
    limit = stream.settings["max_new_tokens"]
    options.n_ctx = len(ids) + stream.settings["num_virtual_tokens"] + limit
    options.n_batch = options.n_ctx
    model = llama.llama_model_load_from_file(
        str(given.model).encode(), llama.llama_model_default_params()
    )
    if not model:
        raise SystemExit(f"{given.model}: cannot be loaded")
    context = llama.llama_init_from_model(model, options)
    vocabulary = llama.llama_model_get_vocab(model)
    size = llama.llama_vocab_n_tokens(vocabulary)
    decode_input(llama, context, stream, ids, place)
    answer: list[int] = []
    while len(answer) < limit:
        logits = llama.llama_get_logits_ith(context, -1)[:size]
        best = max(range(size), key=logits.__getitem__)
        if llama.llama_vocab_is_eog(vocabulary, best):
            break
        answer.append(best)
        check(llama.llama_decode(context, llama.llama_batch_get_one((ctypes.c_int32 * 1)(best), 1)))
    print(stream.tokenizer.decode(answer, skip_special_tokens=True).strip())


if __name__ == "__main__":
    main()
