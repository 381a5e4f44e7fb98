"""Memory and speed from rows to packed batches, for files of growing length.

    python benchmarks/tokens.py --rows 50000 500000
    python benchmarks/tokens.py --rows 500000 5000000 --quick

Rows are generated while they are read (log-normal lengths, median about 60 tokens, maximum 512), so
only tokenization, row order and packing are measured. Each length has its own process and cache.
Memory is the process's anonymous memory (RssAnon): mapped pages of the table belong to the page
cache, which the kernel can reclaim. ``--quick`` splits at spaces instead of tokenizing, so that the
remaining time is this project's own.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STEPS = 100
RESULTS = ROOT / "benchmarks" / "results" / "tokens.json"


class MadeUp:
    """Rows that are generated while they are read."""

    path, digest = "made up", "made up"

    def __init__(self, count: int) -> None:
        text = (ROOT / "examples/data/triage.train.jsonl").read_text().splitlines()
        self._words = " ".join(json.loads(line)["text"] for line in text[:200]).split()
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[dict[str, str]]:
        draw = random.Random(0)
        for _ in range(self._count):
            length = max(2, min(140, int(draw.lognormvariate(2.85, 0.8))))
            start = draw.randrange(len(self._words) - length)
            yield {"text": " ".join(self._words[start : start + length]), "label": "other"}

    def where(self, index: int) -> str:
        return f"row {index + 1}"


class Words:
    """A tokenizer that splits at spaces and takes almost no time."""

    eos_token_id = 0

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[len(word) for word in text.split()] for text in texts]}

    def get_vocab(self) -> dict[str, int]:
        return {}


class Memory(threading.Thread):
    """Measures the peak of this process's anonymous memory in each phase."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._most = 0
        self.start()

    def run(self) -> None:
        while True:
            self._look()
            time.sleep(0.05)

    def _look(self) -> None:
        status = dict(
            line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines()
        )
        self._most = max(self._most, int(status["RssAnon"].split()[0]) * 1024)

    def since_last(self) -> float:
        """Return the peak since the last call, in megabytes."""
        self._look()
        most, self._most = self._most, 0
        return most / 1e6


def measure(count: int, quick: bool) -> dict[str, Any]:
    import torch
    from transformers import AutoTokenizer

    from trainer.config import Task
    from trainer.data.sampler import TokenBudgetSampler
    from trainer.data.tokenization.tokenize import tokenize
    from trainer.distributed.prefetch import RankInfo, prepare_step
    from trainer.packing.packed_row import PackedRow, PromptLengths
    from trainer.runtime.limits import num_cores

    tokenizer: Any = Words()
    if not quick:
        tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples/tiny_base")
    task = Task(name="t", input="{text}\nTopic:", target=" {label}", train="-", too_long="truncate")
    memory = Memory()
    figures: dict[str, Any] = {"rows": count, "quick": quick, "workers": num_cores()}
    figures["before_mb"] = memory.since_last()

    started = time.perf_counter()
    table = tokenize(MadeUp(count), task, tokenizer, 512).examples
    seconds = time.perf_counter() - started
    figures |= {"tokenise_rows_per_second": count / seconds, "tokenise_mb": memory.since_last()}
    figures["tokens_per_row"] = float(table.lengths.mean())

    started = time.perf_counter()
    again = tokenize(MadeUp(count), task, tokenizer, 512).examples
    figures |= {
        "from_cache_seconds": time.perf_counter() - started,
        "cache_mb": memory.since_last(),
    }

    started = time.perf_counter()
    cursor = TokenBudgetSampler(again.lengths, 8192, 0)
    figures["cursor_seconds"] = time.perf_counter() - started
    rank = RankInfo(0, 2, torch.device("cpu"))
    started, tokens = time.perf_counter(), 0
    for _ in range(STEPS):
        packed_rows = [PackedRow(again[row], 0, i) for i, row in enumerate(cursor.next_rows())]
        tokens += sum(packed_row.example.num_tokens for packed_row in packed_rows)
        prepare_step(packed_rows, PromptLengths((20,), (0,)), rank, 4096)
    figures["ms_per_step"] = (time.perf_counter() - started) / STEPS * 1000
    return figures | {"fill": tokens / STEPS / 8192, "steps_mb": memory.since_last()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[50_000, 500_000, 5_000_000])
    parser.add_argument("--alone", action="store_true", help="measure here, print JSON")
    parser.add_argument("--quick", action="store_true", help="split at spaces")
    args = parser.parse_args()
    if args.alone:
        print(json.dumps(measure(args.rows[0], args.quick)))
        return
    results = []
    for count in args.rows:
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run(
                [sys.executable, __file__, "--alone", "--rows", str(count)]
                + ["--quick"] * args.quick,
                env={**os.environ, "PROMPTSHARD_CACHE": folder, "PYTHONPATH": str(ROOT)},
                stdout=subprocess.PIPE,
                check=True,
            )
        results.append(json.loads(done.stdout))
        print(json.dumps(results[-1], indent=1), flush=True)
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    new = {(one["rows"], one["quick"]) for one in results}
    kept = [one for one in known if (one["rows"], one.get("quick", False)) not in new]
    RESULTS.write_text(json.dumps(kept + results, indent=1) + "\n")


if __name__ == "__main__":
    main()
