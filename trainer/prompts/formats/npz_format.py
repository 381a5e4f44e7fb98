"""NumPy: one ``prompt.npz`` with the values and the facts about them, for any other program.

Arrays: ``virtual_tokens`` [P, H] fp32, or ``keys`` and ``values`` [L, P, A, D] fp32 (rotary
positions are applied to the keys as transformers caches them, so they are used as past keys);
``fixed_ids_before`` and ``fixed_ids_after`` int64; ``metadata``, a JSON text. ``numpy.load`` reads
the file with ``allow_pickle=False``, its default.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np

from trainer.prompts.formats.exported_prompt import ExportedPrompt, write_readme
from trainer.prompts.formats.target import Target
from trainer.runtime import atomic_io

_README = """
```python
import json, numpy

with numpy.load("prompt.npz") as arrays:
    metadata = json.loads(str(arrays["metadata"]))
{read}
```

{arrays} `fixed_ids_before` and `fixed_ids_after` are the token ids of the text around the
virtual tokens that all rows have in common. `metadata` has the base, the input template and the
place of the virtual tokens.{scale}
"""
_VIRTUAL = "`virtual_tokens` [{shape}], fp32, in the space of the base's input embeddings."
_PREFIX = "`keys` and `values` [layers, virtual tokens, key heads, head size]: {shape}, fp32."
_SCALE = """

The base multiplies the embeddings of token ids by {scale:g} (`embedding_scale`). The virtual tokens
are in the scaled space: they replace the result of that product."""


def _write(prompt: ExportedPrompt, folder: Path) -> None:
    settings = prompt.settings(server_scales=False)
    arrays = {
        "fixed_ids_before": np.asarray(prompt.fixed_ids[0], dtype=np.int64),
        "fixed_ids_after": np.asarray(prompt.fixed_ids[1], dtype=np.int64),
        "metadata": np.asarray(json.dumps(settings | dict(prompt.metadata), ensure_ascii=False)),
    }
    values = prompt.values
    if prompt.is_prefix:
        keys, past = values.permute(1, 2, 0, 3, 4).unbind(1)
        arrays |= {"keys": keys.contiguous().numpy(), "values": past.contiguous().numpy()}
        shape, text = tuple(keys.shape), _PREFIX
        read = '    keys, values = arrays["keys"], arrays["values"]'
    else:
        arrays["virtual_tokens"] = values.numpy()
        shape, text = tuple(values.shape), _VIRTUAL
        read = '    virtual_tokens = arrays["virtual_tokens"]'
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    atomic_io.write(folder / "prompt.npz", buffer.getvalue())
    shown = text.format(shape=", ".join(map(str, shape)))
    scale = "" if prompt.scale == 1.0 else _SCALE.format(scale=prompt.scale)
    write_readme(prompt, folder, "NumPy", _README.format(read=read, arrays=shown, scale=scale))


NPZ = Target("npz", "NumPy", _write, takes_prefixes=True, families=None)
