"""Send a text with a soft prompt to an SGLang server, from ``promptshard export --to sglang``.

    python sglang_client.py "text" [--url http://localhost:30000]

The text fills the template of the task. Instead of a text, JSON of an object with the columns of
the template, or of a list of messages. The server needs ``--disable-radix-cache``.
"""

from __future__ import annotations

import argparse
import json
import urllib.error
import urllib.request
from typing import Any

from prompt_stream import PromptStream, Request, parse_request


def generate_body(stream: PromptStream, request: Request) -> dict[str, Any]:
    """Return the body for ``/generate``: the embeddings of the complete input."""
    settings = stream.settings
    sampling = {"temperature": 0, "max_new_tokens": settings["max_new_tokens"]}
    if settings["stop"]:
        sampling["stop"] = settings["stop"]
    return {"input_embeds": stream.embeddings(request).tolist(), "sampling_params": sampling}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("request")
    parser.add_argument("--url", default="http://localhost:30000")
    given = parser.parse_args()
    try:
        body = generate_body(PromptStream(), parse_request(given.request))
    except ValueError as error:
        raise SystemExit(str(error)) from None
    headers = {"Content-Type": "application/json"}
    sent = urllib.request.Request(
        f"{given.url.rstrip('/')}/generate", json.dumps(body).encode(), headers
    )
    try:
        with urllib.request.urlopen(sent) as response:
            print(json.load(response)["text"])
    except urllib.error.HTTPError as error:
        raise SystemExit(f"{error.code} {error.reason}: {error.read(2000).decode()}") from None
    except OSError as error:
        raise SystemExit(f"{given.url}: {error}") from None


if __name__ == "__main__":
    main()
