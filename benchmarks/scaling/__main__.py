"""Plan 8B to 671B bases on 1 to 1,024 GPUs, and simulate the gathers of their steps.

    python -m benchmarks.scaling            # plans, simulations, table and plot
    python -m benchmarks.scaling --traces   # measure 2 and 4 CPU ranks with a slow link (root)

Writes benchmarks/results/scaling.{md,json,png}. Traces that were measured earlier are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

from benchmarks.figures import machine
from benchmarks.scaling import plans, report, traces


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--traces", action="store_true", help="measure the traces again")
    args = parser.parse_args()
    result: dict[str, Any] = {"traces": [], "machine": machine()}
    if report.JSON.is_file():
        result = json.loads(report.JSON.read_text(encoding="utf-8"))
    if args.traces:
        os.environ["DS_ACCELERATOR"] = "cpu"
        result |= {"traces": traces.measure(), "machine": machine()}
    result |= {"gpu": plans.GPU, "tokens": plans.TOKENS, "row_tokens": plans.ROW_TOKENS}
    result["bases"] = []
    for base in plans.large_bases():
        print(f"{base.name} ...", file=sys.stderr, flush=True)
        result["bases"].append(plans.measure(base))
    print(report.write(result))


if __name__ == "__main__":
    main()
