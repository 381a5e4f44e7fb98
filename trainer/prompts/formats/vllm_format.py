"""vLLM: ``prompt_embeds`` in the Completions API and in the Chat Completions API.

https://docs.vllm.ai/en/latest/features/prompt_embeds/ and ``vllm/renderers``:

- The server needs ``--enable-prompt-embeds``.
- A tensor is base64 of ``torch.save`` of a 2-D floating-point tensor [tokens, H], which the server
  loads with ``weights_only=True`` and casts to the type of the model.
- Completions apply no chat template: the client sends the embeddings of the complete input.
- Chat Completions take content parts ``{"type": "prompt_embeds", "data": ...}``. The server writes
  the chat template with one special token ``<prompt_embeds>`` per part and then puts the tensor in
  its place. With the content format ``string``, parts of a turn are joined with line breaks, so the
  client sends the complete content of the turn as one part. Virtual tokens before the first token
  of the template cannot be expressed.
- The prefix cache ignores which positions are embeddings (vllm issue 56655), hence
  ``--no-enable-prefix-caching``.

Of the families that scale embeddings, ``models/gemma.py``, ``gemma2.py`` and ``falcon_h1.py``
multiply ``inputs_embeds`` by the factor too; ``gemma3.py`` scales token ids only.
"""

from __future__ import annotations

import base64
import io
import shlex
from pathlib import Path

import torch

from trainer.prompts.formats.exported_prompt import (
    ExportedPrompt,
    write_readme,
    write_stream_files,
)
from trainer.prompts.formats.target import Target
from trainer.runtime import atomic_io

_README = """
Start the server:

```bash
{serve}
```

Send a text. The script needs transformers, safetensors and torch. It reads rows of the base's
embedding table, embeds the complete input{templated}, and sends it to the Completions API:

```bash
python vllm_client.py "..." --url http://localhost:8000
```

{chat}

`virtual_tokens.b64` is `prompt_embeds` of the virtual tokens alone: base64 of `torch.save` of a
tensor [{rows}, {width}], for other clients.

Only trusted users should reach a server with `--enable-prompt-embeds`: vLLM may crash if a tensor
has the wrong shape. The prefix cache is off because it confuses requests that differ only in which
positions are embeddings.
"""
_CHAT = """With the chat template on the server (Chat Completions API); the complete content of the
turn with the virtual tokens is sent as one part of type `prompt_embeds`:

```bash
python vllm_client.py --chat "..." --url http://localhost:8000
```"""
_NO_CHAT = "The Chat Completions API cannot be used: {reason}."
_FRONT = (
    "it puts embeddings inside turns only, and these virtual tokens are before the first token of "
    "the chat template; train with `position: system` to use it"
)
_NO_TEMPLATE = "the prompt was trained without a chat template"


def _write(prompt: ExportedPrompt, folder: Path) -> None:
    rows_PH = write_stream_files(
        prompt, folder, "vllm_client.py", server_scales=VLLM.server_scales(prompt)
    )
    buffer = io.BytesIO()
    torch.save(rows_PH.clone(), buffer)  # a clone: the storage of a view would be saved whole
    atomic_io.write(folder / "virtual_tokens.b64", base64.b64encode(buffer.getvalue()))
    options = ["--enable-prompt-embeds", "--no-enable-prefix-caching"]
    if prompt.revision:
        options += ["--revision", prompt.revision]
    if prompt.chat_template is not None:
        options += ["--chat-template", "chat_template.jinja"]
    rows, width = rows_PH.shape
    is_chat = bool(prompt.request["chat"])
    body = _README.format(
        serve=shlex.join(["vllm", "serve", prompt.base, *options]),
        templated=" (with the chat template)" if is_chat else "",
        chat=chat_text(prompt),
        rows=rows,
        width=width,
    )
    write_readme(prompt, folder, "vLLM", body)


def chat_problem(prompt: ExportedPrompt) -> str | None:
    """Return why the Chat Completions API cannot express a prompt, with the remedy; or None."""
    if not prompt.request["chat"]:
        return _NO_TEMPLATE
    is_front = prompt.request["position"] == "front"
    if is_front and "{virtual_tokens}" not in str(prompt.request["input"]):
        return _FRONT
    return None


def chat_text(prompt: ExportedPrompt) -> str:
    """Return the paragraph about the Chat Completions API."""
    reason = chat_problem(prompt)
    return _CHAT if reason is None else _NO_CHAT.format(reason=reason)


VLLM = Target(
    "vllm",
    "vLLM",
    _write,
    reads_table=True,
    families={"gemma": True, "gemma2": True, "falcon_h1": True, "gemma3_text": False},
)
