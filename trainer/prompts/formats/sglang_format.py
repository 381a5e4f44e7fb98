"""SGLang: ``input_embeds`` of the native endpoint ``/generate``.

``GenerateReqInput.input_embeds`` (``python/sglang/srt/managers/io_struct.py``) is a nested list of
numbers [tokens, H] for the complete input. ``tokenizer_manager.py`` rejects it unless the server
runs with ``--disable-radix-cache``. No chat template is applied.

Of the families that scale embeddings, ``models/gemma.py`` and ``models/gemma2.py`` multiply
``input_embeds`` by the factor too; ``models/gemma3_causal.py`` scales token ids only.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from trainer.prompts.formats.exported_prompt import (
    ExportedPrompt,
    write_readme,
    write_stream_files,
)
from trainer.prompts.formats.target import Target

_README = """
Start the server:

```bash
python -m sglang.launch_server --model-path {base}{revision} --disable-radix-cache
```

Send a text. The script needs transformers, safetensors and torch; it reads rows of the base's
embedding table and sends the embeddings of the complete input:

```bash
python sglang_client.py "..." --url http://localhost:30000
```

The request, for other clients: `POST /generate` with `input_embeds` (a list of numbers per token)
and `sampling_params`.
"""


def _write(prompt: ExportedPrompt, folder: Path) -> None:
    write_stream_files(
        prompt, folder, "sglang_client.py", server_scales=SGLANG.server_scales(prompt)
    )
    revision = f" --revision {shlex.quote(prompt.revision)}" if prompt.revision else ""
    body = _README.format(base=shlex.quote(prompt.base), revision=revision)
    write_readme(prompt, folder, "SGLang", body)


SGLANG = Target(
    "sglang",
    "SGLang",
    _write,
    reads_table=True,
    families={"gemma": True, "gemma2": True, "gemma3_text": False},
)
