"""Speed of the decoder of ``promptshard serve``.

    python -m benchmarks.serving NAME RUN_DIR CONCURRENT ...

For each number of requests at the same time: twice as many requests, of all prompts of the run and
none, whose inputs and answers have different lengths, so that requests join and leave all the time.
Answers do not end early. NAME is that of the run's base in the table. One process with one thread,
without HTTP. Tokens per CPU second hardly depend on what else the machine does; on an idle core
they are tokens per second. Updates benchmarks/results/serving.json and writes serving.md from it.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.figures import machine
from trainer.evaluation.stop_criteria import StopCriteria
from trainer.evaluation.token_sampling import Sampling
from trainer.inference.engine import open_engine
from trainer.inference.loaded_base import InferenceBase
from trainer.inference.opened_base import open_inference_base
from trainer.inference.requests import GenerationRequest
from trainer.inference.saved_run import open_run
from trainer.inference.stream import Limits, StreamingDecoder
from trainer.inference.stream_text import Piece
from trainer.runtime.console import Console

RESULTS = Path(__file__).resolve().parent / "results"
TEXT = "The patient has a headache since this morning and takes a tablet every evening."
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


def decode(base: InferenceBase, requests: Sequence[GenerationRequest], rows: int) -> float:
    """Decode all requests, at most ``rows`` at the same time; return the CPU seconds."""
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
        started = time.process_time()
        for request in requests:
            decoder.submit(request, Sampling(), note)
        ended.wait()
        return time.process_time() - started


def measure(name: str, folder: Path, concurrent: Sequence[int]) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    run = open_run(folder)
    engine = open_engine(run.config.engine.timeout_seconds)
    console = Console(sys.stdout, sys.stderr)
    chosen = list(run.prompts.values())
    base = open_inference_base(engine, run, console, prompts=chosen).load(console)
    decode(base, make_requests(base, 1), 1)  # warm-up
    measured = []
    for rows in concurrent:
        requests = make_requests(base, 2 * rows)
        tokens = sum(request.max_new_tokens for request in requests)
        load, started = os.getloadavg()[0], time.perf_counter()
        seconds = decode(base, requests, rows)
        entry = {
            "base": name,
            "matmul": base.loaded.matmul,
            "prompts": len(chosen),
            "concurrent": rows,
            "requests": len(requests),
            "input_tokens": sum(r.num_tokens - r.max_new_tokens for r in requests),
            "tokens": tokens,
            "tokens_per_cpu_second": round(tokens / seconds, 1),
            "tokens_per_second": round(tokens / (time.perf_counter() - started), 1),
            "load_average": round(load, 1),
        }
        print(entry, flush=True)
        measured.append(entry)
    base.close()
    return measured


def write(measured: Sequence[dict[str, Any]]) -> None:
    """Replace the entries of the same base and number of requests, and write the table."""
    path = RESULTS / "serving.json"
    stored = json.loads(path.read_text())["results"] if path.exists() else []
    entries = {(entry["base"], entry["concurrent"]): entry for entry in [*stored, *measured]}
    results = [
        entries[key] for key in sorted(entries, key=lambda key: (key[0] != "tiny base", key))
    ]
    path.write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")
    lines = [
        "# Speed of the decoder of `promptshard serve`",
        "",
        "`python -m benchmarks.serving NAME RUN_DIR CONCURRENT ...`: greedy, int8, one process "
        f"with one thread, without HTTP. {machine()}.",
        "",
        "Tokens are generated tokens; the time includes that of reading the inputs. Other programs "
        "used the machine: its load average before a measurement is in the last column. Tokens per "
        "CPU second hardly depend on it; on an idle core they are tokens per second.",
        "",
        "| base | requests at a time | requests | tokens read | tokens | tokens per CPU second | "
        "tokens/s as measured | load |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for entry in results:
        lines.append(
            f"| {entry['base']} | {entry['concurrent']} | {entry['requests']} of "
            f"{entry['prompts']} prompts and none | {entry['input_tokens']:,} | "
            f"{entry['tokens']:,} | {entry['tokens_per_cpu_second']:,} | "
            f"{entry['tokens_per_second']:,} | {entry['load_average']} |"
        )
    (RESULTS / "serving.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    base_name, run_folder, *numbers = sys.argv[1:]
    write(measure(base_name, Path(run_folder), [int(number) for number in numbers]))
