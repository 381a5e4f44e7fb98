"""Send a text with a soft prompt to a vLLM server. Written by ``promptshard export --to vllm``.

    python vllm_client.py "text" [--chat] [--url http://localhost:8000]

The text fills the template of the task. Instead of a text, JSON of an object with the columns of
the template, or of a list of messages. The server needs ``--enable-prompt-embeds``.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import urllib.error
import urllib.request
from typing import Any

import torch
from prompt_stream import MARK, PromptStream, Request, parse_request

#: The token that vLLM adds to the tokenizer and puts in place of embeddings in a dialogue.
PLACEHOLDER = "<prompt_embeds>"


def encode(tensor: torch.Tensor) -> str:
    """Return base64 of ``torch.save`` of a tensor [tokens, hidden size], as vLLM reads it."""
    buffer = io.BytesIO()
    torch.save(tensor.contiguous().clone(), buffer)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def completion_body(stream: PromptStream, request: Request, model: str) -> dict[str, Any]:
    """Return the body for ``/v1/completions``: the embeddings of the complete input."""
    return {
        "model": model,
        "prompt_embeds": encode(stream.embeddings(request)),
        **_options(stream),
    }


def chat_body(stream: PromptStream, request: Request, model: str) -> dict[str, Any]:
    """Return the body for ``/v1/chat/completions``.

    The content of the turn with the virtual tokens is one part with the embeddings of all its
    tokens. Raises ``ValueError`` if the server would not read the tokens of ``stream``.
    """
    if not stream.settings["chat"]:
        raise ValueError(
            "the Chat API applies a chat template, and this prompt was trained without one; leave "
            "--chat out"
        )
    messages = stream.messages(request)
    number = next((i for i, turn in enumerate(messages) if MARK in json_text(turn)), None)
    if number is None:
        raise ValueError(
            "the Chat API puts embeddings inside turns only, and these virtual tokens are before "
            "all text; leave --chat out, or train with position: system"
        )
    ids, place = stream.ids(request)
    before, after = server_ids(stream, messages, number)
    end = len(ids) - len(after)
    if ids[: len(before)] != before or ids[end:] != after or not len(before) <= place <= end:
        raise ValueError(
            "the chat template of the server does not give the tokens of the training; leave "
            "--chat out"
        )
    embeddings = torch.cat(
        [
            stream.rows(ids[len(before) : place]),
            stream.virtual_tokens,
            stream.rows(ids[place:end]),
        ]
    )
    part = {"type": "prompt_embeds", "data": encode(embeddings)}
    messages[number] = {**messages[number], "content": [part]}
    body = {"model": model, "messages": messages, **_options(stream)}
    if variables := stream.settings["chat_template_kwargs"]:
        body["chat_template_kwargs"] = variables
    return body


def server_ids(
    stream: PromptStream, messages: list[dict[str, Any]], number: int
) -> tuple[list[int], list[int]]:
    """Return the ids that the server reads before and after the content of one turn."""
    stream.tokenizer.add_special_tokens({"additional_special_tokens": [PLACEHOLDER]})
    placeholder = stream.tokenizer.convert_tokens_to_ids(PLACEHOLDER)
    marked = [*messages]
    marked[number] = {**messages[number], "content": PLACEHOLDER}
    text = stream.tokenizer.apply_chat_template(
        marked,
        tokenize=False,
        add_generation_prompt=True,
        **stream.settings["chat_template_kwargs"],
    )
    ids = list(stream.tokenizer(text, add_special_tokens=False)["input_ids"])
    if ids.count(placeholder) != 1:
        raise ValueError("the chat template does not write the turn with the virtual tokens")
    place = ids.index(placeholder)
    return ids[:place], ids[place + 1 :]


def json_text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def _options(stream: PromptStream) -> dict[str, Any]:
    options = {"max_tokens": stream.settings["max_new_tokens"], "temperature": 0.0}
    return options | ({"stop": stream.settings["stop"]} if stream.settings["stop"] else {})


def ask(url: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Send a request; the token of ``VLLM_API_KEY`` is sent along if it is set."""
    headers = {"Content-Type": "application/json"}
    if token := os.environ.get("VLLM_API_KEY"):
        headers["Authorization"] = f"Bearer {token}"
    data = json.dumps(body).encode()
    sent = urllib.request.Request(url.rstrip("/") + path, data, headers)
    try:
        with urllib.request.urlopen(sent) as response:
            answer: dict[str, Any] = json.load(response)
    except urllib.error.HTTPError as error:
        raise SystemExit(f"{error.code} {error.reason}: {error.read(2000).decode()}") from None
    except OSError as error:
        raise SystemExit(f"{url}: {error}") from None
    return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("request")
    parser.add_argument("--chat", action="store_true", help="use the Chat Completions API")
    parser.add_argument("--url", default="http://localhost:8000")
    parser.add_argument("--model", help="name that the server gives the base")
    given = parser.parse_args()
    stream = PromptStream()
    model = given.model or stream.settings["base_model"]
    request = parse_request(given.request)
    try:
        if given.chat:
            answer = ask(given.url, "/v1/chat/completions", chat_body(stream, request, model))
            print(answer["choices"][0]["message"]["content"])
        else:
            answer = ask(given.url, "/v1/completions", completion_body(stream, request, model))
            print(answer["choices"][0]["text"])
    except ValueError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
