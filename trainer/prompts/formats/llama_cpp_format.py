"""llama.cpp: rows of fp32, which the C API takes as ``llama_batch.embd``.

``include/llama.h``: a batch has ``token`` or ``embd`` (vectors of ``n_embd`` floats, used when
``token`` is NULL); with ``pos`` and ``seq_id`` NULL, positions follow those of earlier batches, and
only the last token has logits. A prompted text is therefore up to three calls of ``llama_decode``:
the tokens before, the virtual tokens, the tokens after. The command line and the server of
llama.cpp take no embeddings.

Of the families that scale embeddings, Gemma 3 and 4 (``src/models``) do not scale ``embd``, so that
virtual tokens stay in the scaled space. How Gemma 1 and 2 do it depends on the release: they are
refused.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from trainer.prompts.formats.exported_prompt import (
    ExportedPrompt,
    write_readme,
    write_stream_files,
)
from trainer.prompts.formats.target import Target
from trainer.runtime import atomic_io

_README = """
`virtual_tokens.f32` has {rows} rows of {width} little-endian fp32 numbers, without a header;
`prompt.json` has their shape and the place of the virtual tokens in the text.

With the Python packages llama-cpp-python, transformers, safetensors and torch:

```bash
python llama_cpp_example.py {model} "..."
```

In C, after reading the rows into `float embd[{rows} * {width}]`:

```c
struct llama_batch before = llama_batch_get_one(ids, place);
struct llama_batch rows = {{ .n_tokens = {rows}, .embd = embd }};  /* token, pos, seq_id: NULL */
struct llama_batch after = llama_batch_get_one(ids + place, count - place);
if (place > 0) llama_decode(ctx, before);
llama_decode(ctx, rows);
llama_decode(ctx, after);  /* llama_get_logits_ith(ctx, -1): logits of the first new token */
```

`n_ctx` and `n_batch` of the context must hold all tokens. Print `ids` and `place` (the number of
ids before the virtual tokens) of a text:

```bash
python -c 'from prompt_stream import PromptStream; print(PromptStream().ids("..."))'
```

The GGUF file must be made from the base, or be quantized from it; quantization changes the answers
a little.
"""


def _write(prompt: ExportedPrompt, folder: Path) -> None:
    rows_PH = write_stream_files(prompt, folder, "llama_cpp_example.py")
    numbers = rows_PH.numpy()
    if sys.byteorder != "little":
        numbers = numbers.byteswap()
    atomic_io.write(folder / "virtual_tokens.f32", numbers.tobytes())
    rows, width = rows_PH.shape
    model = shlex.quote(prompt.base) if prompt.base.endswith(".gguf") else "MODEL.gguf"
    body = _README.format(rows=rows, width=width, model=model)
    write_readme(prompt, folder, "llama.cpp", body)


LLAMA_CPP = Target(
    "llama-cpp", "llama.cpp", _write, families={"gemma3_text": False, "gemma4_text": False}
)
