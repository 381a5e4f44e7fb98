"""TensorRT-LLM: a prompt table, and token ids from ``vocab_size`` on that address its rows.

``PromptTuningEmbedding`` (``tensorrt_llm/layers/embedding.py``) embeds an id ``i >= vocab_size`` as
row ``task * P + i - vocab_size`` of the table. ``examples/run.py --prompt_table_path`` reads the
table [tasks, P, H] from a ``.npy`` file and converts it to the type of the weights;
``--prompt_tasks`` names the task of each input, and ``--input_file`` takes token ids as CSV. The
option ``--num_prepend_vtokens`` of that script is not used: its ids start at the size of the
tokenizer's vocabulary, which may differ from the base's ``vocab_size``, and it puts virtual tokens
in front only.

How a family's factor of embeddings is applied depends on the release, so such bases are refused.
"""

from __future__ import annotations

import io
import shlex
from pathlib import Path

import numpy as np

from trainer.prompts.formats.exported_prompt import (
    ExportedPrompt,
    write_readme,
    write_stream_files,
)
from trainer.prompts.formats.target import Target
from trainer.runtime import atomic_io

_README = """
`prompt_table.npy` is the prompt table [tasks = 1, virtual tokens = {rows}, hidden size = {width}],
fp32; TensorRT-LLM converts it to the type of the weights. The ids {first} to {last} (from the
base's `vocab_size` on) address its rows.

Build the engine of {base} with room for the table:

```bash
trtllm-build --checkpoint_dir CHECKPOINT --output_dir ENGINE \\
    --max_prompt_embedding_table_size {rows}
```

Write the token ids of a text, with those of the virtual tokens in their place, and run
`examples/run.py` of TensorRT-LLM:

```bash
python tensorrt_llm_input.py "..." > input.csv
python run.py --engine_dir ENGINE --tokenizer_dir {base} \\
    --input_file input.csv --max_input_length 4096 --max_output_len {max_new_tokens} \\
    --prompt_table_path prompt_table.npy --prompt_tasks 0
```

The script needs transformers, safetensors and torch, and reads no weights of the base.
"""


def _write(prompt: ExportedPrompt, folder: Path) -> None:
    rows_PH = write_stream_files(prompt, folder, "tensorrt_llm_input.py")
    buffer = io.BytesIO()
    np.save(buffer, rows_PH[None].numpy(), allow_pickle=False)
    atomic_io.write(folder / "prompt_table.npy", buffer.getvalue())
    rows, width = rows_PH.shape
    body = _README.format(
        rows=rows,
        width=width,
        first=prompt.vocab_size,
        last=prompt.vocab_size + rows - 1,
        base=shlex.quote(prompt.base),
        max_new_tokens=prompt.max_new_tokens,
    )
    write_readme(prompt, folder, "TensorRT-LLM", body)


TENSORRT_LLM = Target("tensorrt-llm", "TensorRT-LLM", _write)
