"""Tokens per second of the decoder of ``promptshard serve``.

    python -m benchmarks.serving NAME=RUN_DIR ...

For 1, 8 and 32 requests at the same time: three times as many requests, of all prompts of the run
and none, whose inputs and answers have different lengths, so that requests join and leave all the
time. Answers do not end early. NAME is that of the run's base in the table. One process, without
HTTP. Beside it, the same requests decoded by ``generate`` in batches that start together, as many
rows at a time and one prompt per batch. Writes benchmarks/results/serving.md and serving.json.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

from benchmarks.figures import machine
from trainer.evaluation.generation import generate
from trainer.evaluation.stop_criteria import StopCriteria
from trainer.inference.engine import open_engine
from trainer.inference.loaded_base import InferenceBase, open_inference_base
from trainer.inference.requests import GenerationRequest
from trainer.inference.saved_run import open_run
from trainer.inference.stream import Limits, StreamingDecoder
from trainer.inference.stream_sampling import Sampling
from trainer.inference.stream_text import Piece
from trainer.runtime.console import Console

RESULTS = Path(__file__).resolve().parent / "results"
CONCURRENT = (1, 8, 32)
TEXT = "The patient has a headache since this morning and takes a tablet every evening. " * 2
SHORTEST, LONGEST = 8, 24


def make_requests(base: InferenceBase, count: int) -> list[GenerationRequest]:
    """Return requests of all prompts in turn, with inputs and answers of different lengths."""
    assert base.run is not None
    names = [*base.run.prompts, None]
    requests = []
    for i in range(count):
        text = TEXT[: 20 + (37 * i) % (len(TEXT) - 20)]
        name, limit = names[i % len(names)], SHORTEST + (7 * i) % (LONGEST - SHORTEST + 1)
        task = None if name else base.config.tasks[0].name
        request = base.text_request(text, name, task=task, max_new_tokens=limit)
        requests.append(replace(request, stop=StopCriteria(base.tokenizer, frozenset())))
    return requests


def seconds_of_decoder(
    base: InferenceBase, requests: Sequence[GenerationRequest], rows: int
) -> float:
    """Decode all requests, at most ``rows`` at the same time."""
    prompts = list({id(r.prompt): r.prompt for r in requests if r.prompt is not None}.values())
    limits = Limits(rows, None, len(requests))
    decoder = StreamingDecoder(base.engine, base.loaded.model, prompts, limits)
    unfinished, ended = [len(requests)], threading.Event()

    def note(piece: Piece) -> None:
        if piece.finish is not None:
            unfinished[0] -= 1
            if not unfinished[0]:
                ended.set()

    with decoder.running():
        started = time.perf_counter()
        for request in requests:
            decoder.submit(request, Sampling(), note)
        ended.wait()
        return time.perf_counter() - started


def seconds_of_generate(
    base: InferenceBase, requests: Sequence[GenerationRequest], rows: int
) -> float:
    """Decode all requests in batches of one prompt, each as long as its longest answer."""
    started = time.perf_counter()
    of_prompt = sorted(requests, key=lambda request: id(request.prompt))
    for _, group in groupby(of_prompt, key=lambda request: id(request.prompt)):
        same = list(group)
        for first in range(0, len(same), rows):
            batch = same[first : first + rows]
            generate(
                *(base.engine, base.loaded.model, batch[0].stop),
                [request.input_ids for request in batch],
                batch[0].prompt,
                max(request.max_new_tokens for request in batch),
                prompt_at=[request.prompt_at for request in batch],
            )
    return time.perf_counter() - started


def measure(name: str, folder: Path) -> list[dict[str, Any]]:
    run = open_run(folder)
    engine = open_engine(run.config.engine.timeout_seconds)
    console = Console(sys.stdout, sys.stderr)
    chosen = list(run.prompts.values())
    base = open_inference_base(engine, run, console, prompts=chosen).load(console)
    seconds_of_decoder(base, make_requests(base, 4), 4)  # warm-up
    measured = []
    for rows in CONCURRENT:
        requests = make_requests(base, 3 * rows)
        tokens = sum(request.max_new_tokens for request in requests)
        load = os.getloadavg()[0]
        rates = [
            tokens / seconds(base, requests, rows)
            for seconds in (seconds_of_decoder, seconds_of_generate)
        ]
        measured.append(
            {
                "base": name,
                "prompts": len(chosen),
                "concurrent": rows,
                "requests": len(requests),
                "tokens": tokens,
                "decoder_tokens_per_second": round(rates[0], 1),
                "generate_tokens_per_second": round(rates[1], 1),
                "load_average": round(load, 1),
            }
        )
        print(measured[-1], flush=True)
    base.close()
    return measured


def main(arguments: Sequence[str]) -> None:
    pairs = [argument.partition("=") for argument in arguments]
    measured = [entry for name, _, folder in pairs for entry in measure(name, Path(folder))]
    (RESULTS / "serving.json").write_text(
        json.dumps({"machine": machine(), "results": measured}, indent=1) + "\n"
    )
    lines = [
        "# Tokens per second of the decoder of `promptshard serve`",
        "",
        f"`python -m benchmarks.serving NAME=RUN_DIR ...`: greedy, one process. {machine()}. The "
        "load average is that of the machine before a measurement; 0 would be an idle one.",
        "",
        "`generate` decodes the same requests in batches that start together, with one prompt per "
        "batch, each as long as its longest answer.",
        "",
        "| base | at a time | requests, prompts | tokens/s | `generate`, tokens/s | load |",
        "|---|---|---|---|---|---|",
    ]
    for entry in measured:
        lines.append(
            f"| {entry['base']} | {entry['concurrent']} | {entry['requests']}, "
            f"{entry['prompts']} and none | {entry['decoder_tokens_per_second']:,} | "
            f"{entry['generate_tokens_per_second']:,} | {entry['load_average']} |"
        )
    (RESULTS / "serving.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
