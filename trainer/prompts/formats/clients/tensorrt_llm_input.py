"""Print the token ids of a text as CSV. Written by ``promptshard export --to tensorrt-llm``.

    python tensorrt_llm_input.py "text" > input.csv

Ids from the base's ``vocab_size`` on are the virtual tokens. The text fills the template of the
task. Instead of a text, JSON of an object with the columns of the template, or of a list of
messages.
"""

from __future__ import annotations

import argparse

from prompt_stream import PromptStream, Request, parse_request


def input_ids(stream: PromptStream, request: Request) -> list[int]:
    """Return the ids of a request, with those of the virtual tokens in their place."""
    ids, place = stream.ids(request)
    first = stream.settings["vocab_size"]
    virtual = range(first, first + stream.settings["num_virtual_tokens"])
    return [*ids[:place], *virtual, *ids[place:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("request")
    given = parser.parse_args()
    try:
        print(",".join(map(str, input_ids(PromptStream(), parse_request(given.request)))))
    except ValueError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
