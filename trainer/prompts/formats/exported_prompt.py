"""A trained prompt and all that exported files state about it.

Shape letters: P virtual tokens, H hidden size, L layers, A key heads, D head size.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save as to_bytes
from torch import Tensor

from trainer.prompts.soft_prompt import PrefixKeyValues, SoftPrompt
from trainer.runtime import atomic_io

#: Scripts that are copied into exported folders.
CLIENTS = Path(__file__).parent / "clients"


@dataclass(frozen=True)
class ExportedPrompt:
    """One prompt of a run, with the facts about its base and its task that targets need.

    Attributes:
        adapter: its folder in PEFT's format.
        out: the folder that is exported.
        base: absolute path of the base's folder or GGUF file, or its hub id.
        model_type: of the base's text model.
        vocab_size: rows of the base's embedding table.
        fixed_ids: token ids of the fixed text before and after the virtual tokens, in all rows.
        is_inside: the text before the virtual tokens differs between rows.
        embedding_tensor: name of the base's embedding table in its safetensors files; None: it is
            not stored as plain rows.
        embedding_problem: reason and remedy if ``embedding_tensor`` is None.
        scale: factor of the embeddings of token ids, rounded to the compute type.
        has_per_layer_inputs: the layers of the base also read token ids.
        request: settings from which ``clients/prompt_stream.py`` makes token ids: ``input``,
            ``chat``, ``system``, ``position``, ``chat_template_kwargs``.
        chat_template: replaces that of the base's tokenizer; None: the tokenizer's own.
        max_new_tokens, stop: of the task.
        peft_type: of exported keys and values, ``prefix_tuning`` or ``cartridge``.
    """

    name: str
    prompt: SoftPrompt
    adapter: Path
    out: Path
    base: str
    revision: str | None
    model_type: str
    vocab_size: int
    fixed_ids: tuple[list[int], list[int]]
    is_inside: bool
    embedding_tensor: str | None
    embedding_problem: str
    scale: float
    has_per_layer_inputs: bool
    request: Mapping[str, Any]
    chat_template: str | None
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    peft_type: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def is_prefix(self) -> bool:
        return isinstance(self.prompt, PrefixKeyValues)

    @property
    def values(self) -> Tensor:
        """The trained values on the CPU, in fp32: [P, H], or [P, L, 2, A, D]."""
        return self.prompt.tensor.detach().to("cpu").float().contiguous()

    @property
    def position(self) -> str:
        """Place of the virtual tokens, in words."""
        position = str(self.request["position"])
        if position != "front":
            return f"in the turn of the {position}"
        if "{virtual_tokens}" in str(self.request["input"]):
            return "at {virtual_tokens} in the input template"
        return "before the whole text"

    def settings(self, *, server_scales: bool) -> dict[str, Any]:
        """Return the content of ``prompt.json``.

        Args:
            server_scales: the target multiplies all input embeddings by ``scale``.
        """
        return {
            "name": self.name,
            "base_model": self.base,
            "revision": self.revision,
            "num_virtual_tokens": self.prompt.num_virtual_tokens,
            "hidden_size": self.values.shape[-1],
            "vocab_size": self.vocab_size,
            **self.request,
            "fixed_ids_before": self.fixed_ids[0],
            "fixed_ids_after": self.fixed_ids[1],
            "embedding_tensor": self.embedding_tensor,
            "embedding_scale": 1.0 if server_scales else self.scale,
            "max_new_tokens": self.max_new_tokens,
            "stop": list(self.stop),
        }


def write_stream_files(
    prompt: ExportedPrompt, folder: Path, *clients: str, server_scales: bool = False
) -> Tensor:
    """Write ``prompt.json``, the virtual tokens and the scripts that read them.

    Returns:
        The virtual tokens [P, H] as the target reads them: divided by the base's factor of
        embeddings if the target multiplies all input embeddings by it.
    """
    rows_PH = prompt.values / prompt.scale if server_scales else prompt.values
    settings = prompt.settings(server_scales=server_scales)
    atomic_io.write_json(folder / "prompt.json", settings)
    atomic_io.write(
        folder / "virtual_tokens.safetensors",
        to_bytes({"virtual_tokens": rows_PH.contiguous()}, {"format": "pt"}),
    )
    if prompt.chat_template is not None:
        atomic_io.write(folder / "chat_template.jinja", prompt.chat_template)
    for name in ("prompt_stream.py", *clients):
        shutil.copyfile(CLIENTS / name, folder / name)
    return rows_PH


def write_readme(prompt: ExportedPrompt, folder: Path, title: str, body: str) -> None:
    """Write ``README.md``: what the folder holds, then ``body``."""
    count = prompt.prompt.num_virtual_tokens
    what = "keys and values" if prompt.is_prefix else "embeddings"
    atomic_io.write(
        folder / "README.md",
        f"# {prompt.name} for {title}\n\n"
        f"{count} virtual tokens ({what}), trained by promptshard for the base\n"
        f"{code(prompt.base)}. Their place: {prompt.position}.\n\n{body.strip()}\n",
    )


def code(text: str) -> str:
    """Format untrusted text as one span of Markdown code."""
    shown = json.dumps(text, ensure_ascii=False)[1:-1].replace("`", "'")
    return f"`{shown}`"
