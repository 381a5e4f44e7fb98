"""Token ids and input embeddings of a text with a soft prompt in it.

Written by ``promptshard export``. Reads ``prompt.json`` and ``virtual_tokens.safetensors`` beside
it, the tokenizer of the base, and some rows of its embedding table, never the other weights. Needs
transformers, safetensors and torch.

    from prompt_stream import PromptStream
    stream = PromptStream()
    ids, place = stream.ids("text")            # place: number of ids before the virtual tokens
    embeddings = stream.embeddings("text")     # [tokens, hidden size]

A request is a text, which fills the template of the task if that has one column that is not
optional; an object with the columns of the template; a list of messages, for a task with a chat
template; or a list of ids.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoTokenizer

#: Marks the place of the virtual tokens in a text.
MARK = "\uf8ff\ue000\uf8ff"
#: ``{column}``, or a brace that is written twice.
FIELD = re.compile(r"\{\{|\}\}|\{([^{}]+)\}")
#: Texts before which a text that would merge with its own context is tokenized.
CONTEXTS = ("\n", ".", "(", "a", "0")

Request = str | Mapping[str, Any] | Sequence[Mapping[str, Any]] | Sequence[int]


class PromptStream:
    """The tokens that the base reads for a request, and the place of the virtual tokens in them.

    Args:
        folder: an exported folder. [default: that of this file]
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = Path(__file__).parent if folder is None else Path(folder)
        self.settings: dict[str, Any] = json.loads((self.folder / "prompt.json").read_text("utf-8"))
        base = Path(self.settings["base_model"])
        options = {"revision": self.settings["revision"] or "main"}
        if base.suffix == ".gguf":
            options, base = {"gguf_file": base.name}, base.parent
        self.tokenizer = AutoTokenizer.from_pretrained(str(base), **options)
        template = self.folder / "chat_template.jinja"
        if template.is_file():
            self.tokenizer.chat_template = template.read_text("utf-8")
        self._unknown = getattr(self.tokenizer, "unk_token_id", None)

    @cached_property
    def virtual_tokens(self) -> torch.Tensor:
        """The trained rows [virtual tokens, hidden size], in fp32."""
        rows: torch.Tensor = load_file(self.folder / "virtual_tokens.safetensors")["virtual_tokens"]
        return rows

    def ids(self, request: Request) -> tuple[list[int], int]:
        """Return the token ids of a request, and the number of those before the virtual tokens."""
        if isinstance(request, list) and request and isinstance(request[0], int):
            return list(request), 0
        if self.settings["chat"]:
            text = self._written(self.messages(request))
            before, mark, after = text.partition(MARK)
            if not mark:
                return self._encode(text), 0
            first = self._encode(before)
            return first + self._continuation(before, first, after, special=False), len(first)
        before, mark, after = self._filled(request).partition(MARK)
        first = self._inputs(before)
        if not mark:
            return first, 0
        return first + self._continuation(before, first, after, special=True), len(first)

    def embeddings(self, request: Request) -> torch.Tensor:
        """Return the input embeddings of a request, with the virtual tokens in their place."""
        ids, place = self.ids(request)
        return torch.cat([self.rows(ids[:place]), self.virtual_tokens, self.rows(ids[place:])])

    def rows(self, ids: Sequence[int]) -> torch.Tensor:
        """Read the embeddings [tokens, hidden size] of some ids, in fp32."""
        file, name = self._table
        with safe_open(file, framework="pt") as opened:
            table = opened.get_slice(name)
            known = {i: table[i : i + 1].float() for i in sorted(set(ids))}
        if not ids:
            return self.virtual_tokens[:0]
        rows: torch.Tensor = torch.cat([known[i] for i in ids])
        return rows * self.settings["embedding_scale"]

    def messages(self, request: Request) -> list[dict[str, Any]]:
        """Return the dialogue of a request, with the mark of the virtual tokens."""
        if isinstance(request, list | tuple):
            turns = [dict(turn) for turn in request if isinstance(turn, Mapping)]
        else:
            turns = [{"role": "user", "content": self._filled(request)}]
        if (system := self.settings["system"]) is not None:
            if turns and turns[0]["role"] == "system":
                turns[0] = _with_text_before(turns[0], f"{system}\n\n")
            else:
                turns.insert(0, {"role": "system", "content": system})
        position = self.settings["position"]
        if position == "front":
            return turns
        number = next((i for i, turn in enumerate(turns) if turn["role"] == position), None)
        if number is None and position == "user":
            raise ValueError("the messages have no turn of the user")
        if number is None:
            return [{"role": "system", "content": MARK}, *turns]
        turns[number] = _with_text_before(turns[number], MARK)
        return turns

    def _written(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Write a dialogue with the chat template, and the beginning of the answer."""
        text: str = self.tokenizer.apply_chat_template(
            list(messages),
            tokenize=False,
            add_generation_prompt=True,
            **self.settings["chat_template_kwargs"],
        )
        return text

    def _filled(self, request: Request) -> str:
        """Fill the template of the task; the mark is in place of ``{virtual_tokens}``."""
        template, optional = self.settings["input"], self.settings["optional"]
        names = dict.fromkeys(name for name in FIELD.findall(template) if name)
        columns = [name for name in names if name != "virtual_tokens"]
        if isinstance(request, str):
            required = [name for name in columns if name not in optional]
            if len(required) != 1:
                if "virtual_tokens" in names:
                    raise ValueError(f"give an object with the columns {', '.join(columns)}")
                return request
            request = {required[0]: request}
        if not isinstance(request, Mapping):
            raise ValueError("this prompt reads a text, or an object with the columns of a row")
        row = dict(request) | {name: "" for name in optional if request.get(name) is None}

        def value(match: re.Match[str]) -> str:
            if match[1] == "virtual_tokens":
                return MARK
            return str(row[match[1]]) if match[1] else match[0][0]

        return FIELD.sub(value, template)

    def _encode(self, text: str, *, special: bool = False) -> list[int]:
        encoded = self.tokenizer(text, add_special_tokens=special, verbose=False)
        return list(encoded["input_ids"])

    def _inputs(self, text: str) -> list[int]:
        """Tokenize a text with the special tokens at its beginning once, and none at its end."""
        bare, full = self._encode("a"), self._encode("a", special=True)
        starts = (i for i in range(len(full)) if full[i : i + len(bare)] == bare)
        start = next(starts, None)
        front = full[:start] if start else []
        back = full[start + len(bare) :] if start is not None else []
        ids = self._encode(text, special=True)
        if front and ids[: 2 * len(front)] == front * 2:
            ids = ids[len(front) :]
        return ids[: -len(back)] if back and ids[-len(back) :] == back else ids

    def _continuation(
        self, before: str, first: list[int], after: str, *, special: bool
    ) -> list[int]:
        """Tokenize the text after the virtual tokens as the continuation of that before them.

        If the two merge, the continuation of another text is used.
        """
        if not after:
            return []
        joined = self._inputs(before + after) if special else self._encode(before + after)
        is_text = bool(first) or special
        if is_text and joined[: len(first)] == first and first[-1:] != [self._unknown]:
            return joined[len(first) :]
        for context in CONTEXTS:
            own, both = self._encode(context), self._encode(context + after)
            if own and self._unknown not in own and both[: len(own)] == own and both != own:
                return both[len(own) :]
        return self._encode(after)

    @cached_property
    def _table(self) -> tuple[str, str]:
        """The file with the base's embedding table, and the name of the tensor."""
        name = self.settings["embedding_tensor"]
        if name is None:
            raise ValueError("the embedding table of this base cannot be read by rows")
        single, index = "model.safetensors", "model.safetensors.index.json"
        path = self._base_file(single)
        if path is None:
            path = self._base_file(index)
            if path is None:
                raise ValueError(f"the base has neither {single} nor {index}")
            path = self._base_file(json.loads(path.read_text("utf-8"))["weight_map"][name])
        return str(path), name

    def _base_file(self, name: str) -> Path | None:
        """Return a file of the base, downloaded if it is on the hub; None if there is none."""
        base = Path(self.settings["base_model"])
        if base.is_dir():
            return base / name if (base / name).is_file() else None
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        try:
            return Path(hf_hub_download(str(base), name, revision=self.settings["revision"]))
        except EntryNotFoundError:
            return None


def _with_text_before(turn: Mapping[str, Any], text: str) -> dict[str, Any]:
    """Write a text before that of a turn."""
    content = turn.get("content") or ""
    if isinstance(content, str):
        return {**turn, "content": text + content}
    first, *rest = content  # no part of its own: some chat templates read the first part only
    return {**turn, "content": [{**first, "text": text + first["text"]}, *rest]}


def parse_request(text: str) -> Request:
    """Read a request of the command line: JSON of an object or a list, or else a text."""
    if text[:1] in "{[":
        try:
            parsed: Request = json.loads(text)
        except ValueError:
            return text
        return parsed
    return text
