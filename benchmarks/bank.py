"""Speed and traffic of a bank: 1, 4, 16 and 64 prompts on the tiny base model, on 2 CPU ranks.

    python -m benchmarks.bank
    python -m benchmarks.bank --quick      # 1 and 4 prompts, few steps; writes nothing

Runs ``promptshard train`` on the quickstart's triage task with prompts from a sweep over seeds.
Reports useful tokens per second, and the bytes per rank, update and prompt: all-gathered layers,
which all prompts of a step share, and exchanged rows (embeddings, hidden states for the head),
which grow with the number of rows. Also compares the wall time of one run of 16 prompts with 16
runs of one prompt each, one after the other, including start-up. Bytes are counted and do not
depend on the machine; speeds and times do. Writes a table and JSON to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from benchmarks.figures import figure, figure_rows, machine

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
RANKS = 2
#: Upper limit of layer bytes per prompt-step with K prompts, times K, relative to one prompt. Bytes
#: that all prompts share exactly give 1.
EXACT = 1.05


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it works")
    quick = parser.parse_args().quick
    counts, compared, steps = ([1, 4], 2, 4) if quick else ([1, 4, 16, 64], 16, 30)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        arms = [arm(folder / f"bank-{count}", list(range(count)), steps) for count in counts]
        bank = arm(folder / "one", list(range(compared)), steps)
        alone = [arm(folder / f"alone-{seed}", [seed], steps) for seed in range(compared)]
        same = largest_difference(folder, compared)
    report = {
        "ranks": RANKS,
        "steps": steps,
        "machine": machine(),
        "arms": arms,
        "compared": compared,
        "wall_seconds": {"bank": bank["seconds"], "alone": [a["seconds"] for a in alone]},
        "largest_difference": same,
        "figures": figures(arms, bank, alone),
    }
    text = table(report)
    if not quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "bank.json").write_text(json.dumps(report, indent=2) + "\n")
        (RESULTS / "bank.md").write_text(text)
    print(text)


def arm(output: Path, seeds: list[int], steps: int) -> dict[str, Any]:
    """Train one prompt per seed in one run; return its time, speed and traffic."""
    run = yaml.safe_load((ROOT / "examples" / "quickstart.yaml").read_text())
    run["output_dir"] = str(output)
    run["tasks"] = run["tasks"][:1]
    task = run["tasks"][0]
    task["hand_written"] = []
    task.pop("shifted_validation")
    run["prompts"] = [
        {
            "name": "bank",
            "task": task["name"],
            "num_virtual_tokens": 10,
            "learning_rate": 0.03,
            "sweep": {"seed": seeds},
        }
    ]
    run["training"] = {"steps": steps, "tokens_per_step": 512}
    run["evaluation"] = {"every": steps}
    run["checkpoint"] = {"every": steps}
    run["tracking"] = {"system_metrics": False}
    run["search"] = {"max_prompts": len(seeds)}
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(run))
    print(f"{len(seeds)} prompt(s), {steps} steps, {RANKS} ranks ...", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "launch", "train", str(path), "--processes", str(RANKS)]
    started = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
    results = json.loads((output / "summary.json").read_text())
    gathered, exchanged = (
        results["communication"][f"{what}_bytes_per_step"] for what in ("gathered", "exchanged")
    )
    return {
        "prompts": len(seeds),
        "useful_tokens_per_second": results["throughput"]["useful_tokens_per_second"],
        "train_seconds": results["throughput"]["train_seconds"],
        "gathered_bytes_per_step": gathered,
        "gathered_bytes_per_prompt_step": gathered / len(seeds),
        "layer_bytes_per_prompt_step": (gathered - exchanged) / len(seeds),
        "exchanged_bytes_per_prompt_step": exchanged / len(seeds),
        "stream_tokens": results["memory"]["stream_tokens"],
        "seconds": seconds,
    }


def largest_difference(folder: Path, count: int) -> float:
    """Return the largest difference of a prompt's validation losses in the bank and alone."""
    bank = json.loads((folder / "one" / "summary.json").read_text())["prompts"]
    differences = []
    for seed in range(count):
        (alone,) = json.loads((folder / f"alone-{seed}" / "summary.json").read_text())[
            "prompts"
        ].values()
        name = f"bank-seed{seed:0{len(str(count - 1))}d}"
        differences.append(abs(bank[name]["validation_loss"] - alone["validation_loss"]))
    return max(differences)


def figures(
    arms: list[dict[str, Any]], bank: dict[str, Any], alone: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return each figure with its target."""
    one, results = arms[0], []
    for arm in arms[1:]:
        count = arm["prompts"]
        for what, reach in (("layer", EXACT), ("gathered", None)):
            key = f"{what}_bytes_per_prompt_step"
            name = {"layer": "layers gathered", "gathered": "all bytes gathered"}[what]
            name = f"{name} per prompt-step of {count} prompts, x {count} / of one prompt"
            results.append(figure(name, arm[key] * count / one[key], reach))
    together = sum(run["seconds"] for run in alone)
    results.append(
        figure(
            f"wall time of one run of {len(alone)} prompts / {len(alone)} runs",
            bank["seconds"] / together,
            0.5,
        )
    )
    return results


def table(report: dict[str, Any]) -> str:
    """Render the figures and the measurements as Markdown."""
    wall = report["wall_seconds"]
    lines = [
        "# A bank of prompts over one base",
        "",
        f"`python -m benchmarks.bank`, {report['machine']}, {report['ranks']} ranks, "
        f"{report['steps']} steps of 512 useful tokens per prompt, on the tiny base.",
        "",
        *figure_rows(report["figures"]),
    ]
    lines += [
        "",
        "| prompts | useful tokens/s | kB per prompt-step: layers | exchanged |",
        "|---|---|---|---|",
    ]
    for arm in report["arms"]:
        lines.append(
            f"| {arm['prompts']} | {arm['useful_tokens_per_second']:,.0f} "
            f"| {arm['layer_bytes_per_prompt_step'] / 1e3:.2f} "
            f"| {arm['exchanged_bytes_per_prompt_step'] / 1e3:.2f} |"
        )
    lines += [
        "",
        f"Wall time: {wall['bank']:.0f} s for {report['compared']} prompts in one run, "
        f"{sum(wall['alone']):.0f} s in {report['compared']} runs, start-up included. Their "
        f"validation losses differ by at most {report['largest_difference']:.1e}. Bytes: what the "
        "rank that received most got from others in training steps. Exchanged: for rows, so that "
        "each prompt brings its own: word embeddings looked up, hidden states sent to the head.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
