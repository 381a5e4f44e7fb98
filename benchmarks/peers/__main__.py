"""Useful tokens per second and cost per token: this trainer compared with PEFT, ZeRO-3 and TRL.

    pip install -c constraints.txt -e '.[test,benchmark]'
    python -m benchmarks.peers [--timed 6] [--only NAME ...]

All arms of a case are loaded at once and take turns, so that other load on the machine affects all
of them equally. Writes a table, a plot and JSON to benchmarks/results/; results of cases that are
not selected are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.llama import LLAMA_110M, make_base
from benchmarks.peers.arms import AS_PEERS, COUNTED, EPOCH, WARM_UP, Case
from benchmarks.peers.report import summary, table, write
from benchmarks.peers.turns import Conductor

ROOT = Path(__file__).resolve().parents[2]
#: Only the fastest peer is also measured without grouping by length.
TWO_RANKS = (
    "ours",
    "PEFT + Trainer",
    "PEFT + Trainer, grouped",
    "PEFT + ZeRO-3, grouped",
    "TRL + PEFT, grouped",
)
ONE_PROCESS = ("ours", "PEFT + Trainer", "PEFT + Trainer, grouped")
GAIN_LEAST = ("ours", "PEFT + Trainer, grouped", "PEFT + ZeRO-3, grouped", "TRL + PEFT, grouped")
LOSS_STEPS = 50
#: Adam follows the sign of gradients that are nearly zero, so at higher learning rates their
#: rounding errors grow from step to step, in every trainer.
LOSS_RATE = 1.0e-4
SHAPE = LLAMA_110M | {"dtype": "float32"}
QUICK_SHAPE = SHAPE | {"vocab_size": 1000, "hidden_size": 64, "num_hidden_layers": 2}
QUICK_SHAPE |= {"intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}


def cases(base: str, timed: int) -> dict[str, tuple[Case, tuple[str, ...]]]:
    """Return each case and its arms, by name."""
    usual = Case(base, 20, ranks=2, batch=4, accumulation=6, timed=timed)
    single = replace(usual, batch=1, accumulation=8, single=True)
    return {
        "20 virtual tokens": (usual, TWO_RANKS),
        "100 virtual tokens": (replace(usual, num_virtual_tokens=100), TWO_RANKS),
        "one process, 20 virtual tokens": (replace(usual, ranks=1), ONE_PROCESS),
        "rows of equal length": (
            replace(usual, equal=True),
            (GAIN_LEAST[0], AS_PEERS, *GAIN_LEAST[1:]),
        ),
        "one row per packed batch": (single, GAIN_LEAST),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--timed", type=int, default=6, help="timed turns of every arm, even")
    parser.add_argument("--only", nargs="+", help="cases, by how their names begin, or losses")
    parser.add_argument("--quick", action="store_true", help="a small base; nothing is written")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="promptshard-peers-") as temporary:
        base = Path(temporary) / "llama-110m"
        make_base(base, QUICK_SHAPE if arguments.quick else SHAPE)
        results: dict[str, Any] = {}
        losses, report = None, summary({}, None)
        for name, (case, arms) in cases(str(base), arguments.timed).items():
            if _asked(name, arguments.only):
                results[name] = compare(name, case, arms, Path(temporary))
                report = _reported(results, losses, arguments.quick)
        if _asked("losses", arguments.only):
            losses = compare_losses(str(base), Path(temporary))
            report = _reported(results, losses, arguments.quick)
    print(table(report))


def _reported(
    results: dict[str, Any], losses: dict[str, list[float]] | None, quick: bool
) -> dict[str, Any]:
    """Return the report so far, written unless ``quick``: all cases take hours."""
    report = summary(results, losses)
    return report if quick else write(report)


def _asked(name: str, only: list[str] | None) -> bool:
    return only is None or any(name.startswith(part) for part in only)


def compare(name: str, case: Case, arms: tuple[str, ...], folder: Path) -> dict[str, Any]:
    """Run the arms in turns; return each arm's measurements ``timed``, ``costs`` and ``shares``."""
    players = {arm: Player(arm, case, folder / name.replace(" ", "-")) for arm in arms}
    results: dict[str, list[Any]] = {arm: [] for arm in arms}
    try:
        for arm in arms:  # one after the other, to limit the memory needed for loading
            players[arm].start()
        *interleaved, before_last, last = range(WARM_UP + case.timed + len(COUNTED))
        order = [(arm, turn) for turn in interleaved for arm in arms]
        order += [(arm, turn) for arm in arms for turn in (before_last, last)]
        for arm, turn in order:
            print(f"{name}: turn {turn}, {arm}", file=sys.stderr, flush=True)
            results[arm].append(players[arm].play(turn))
    finally:
        for player in players.values():
            player.stop()
    counted = WARM_UP + case.timed
    return {
        arm: {
            "timed": turns[WARM_UP:counted],
            "costs": turns[counted : counted + EPOCH],
            "shares": turns[-1],
        }
        for arm, turns in results.items()
    }


def compare_losses(base: str, folder: Path) -> dict[str, list[float]]:
    """Return losses of the same steps from the same initial prompt, in fp32 without int8."""
    timed = LOSS_STEPS - WARM_UP - len(COUNTED)
    case = Case(base, 20, ranks=1, batch=4, accumulation=1, timed=timed, learning_rate=LOSS_RATE)
    losses = {}
    for arm in ("ours, fp32", "PEFT + Trainer, in order"):
        print(f"losses: {arm}", file=sys.stderr, flush=True)
        player = Player(arm, case, folder / "losses")
        try:
            player.start()
            for turn in range(LOSS_STEPS):
                player.play(turn)
            losses[arm] = player.losses()
        finally:
            player.stop()
    return losses


class Player:
    """The processes of one arm."""

    def __init__(self, arm: str, case: Case, folder: Path) -> None:
        self._arm, self._case = arm, case
        self._folder = folder / arm.replace(" ", "-")
        self._ranks: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Start all ranks and wait until they are loaded."""
        from launch.launcher_command import free_port

        self._conductor = Conductor(self._folder, self._case.ranks, self._check)
        self._case.write(self._folder / "case.json")
        shared = {
            "WORLD_SIZE": str(self._case.ranks),
            "LOCAL_WORLD_SIZE": str(self._case.ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // self._case.ranks)),
            "TOKENIZERS_PARALLELISM": "false",
            "DS_ACCELERATOR": "cpu",
        }
        for rank in range(self._case.ranks):
            with (self._folder / f"log.{rank}").open("wb") as log:
                self._ranks.append(
                    subprocess.Popen(
                        [
                            sys.executable,
                            "-m",
                            "benchmarks.peers.arms",
                            self._arm,
                            str(self._folder / "case.json"),
                            str(self._folder),
                        ],
                        cwd=ROOT,
                        env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                )
        self._conductor.ready(0)

    def play(self, turn: int) -> list[dict[str, Any]]:
        return self._conductor.play(turn)

    def losses(self) -> list[float]:
        for rank in self._ranks:
            rank.wait(timeout=120)
        losses: list[float] = json.loads((self._folder / "losses.json").read_text())
        return losses

    def stop(self) -> None:
        for rank in self._ranks:
            rank.kill()
            rank.wait()

    def _check(self) -> None:
        for number, rank in enumerate(self._ranks):
            if rank.poll() not in (None, 0):
                log = (self._folder / f"log.{number}").read_text(errors="replace")
                raise RuntimeError(f"{self._arm}, rank {number} ended:\n{log[-4000:]}")


if __name__ == "__main__":
    main()
