"""Program: every family's step and the parts of a run, on a simulated device.

python -m tests.on_other_device OUT.json
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.unsharded_base import load_unsharded
from tests.family_bases import CASES, errors, save_family
from tests.other_device import Waits, other_device
from tests.packed_step import IN_BF16, OUTLIERS, PRODUCTS, PackedStep
from tests.parts_of_a_run import PROMPTS, answered, trained
from trainer.model.layers.matmul_selection import use_matmul
from trainer.model.layers.moe import FrozenExperts

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
TINY = ROOT / "examples" / "tiny_base"


def main() -> None:
    os.chdir(ROOT)
    with torch.compiler.set_stance("force_eager"):
        families = {f"{case}-dequantize": family(case, "dequantize") for case in CASES}
        for case, kind in PRODUCTS:
            families[f"{case}-{kind}"] = family(case, kind, checkpointing=True)
        for case in IN_BF16:
            families[f"{case}-bf16"] = family(
                case, "dequantize", checkpointing=True, dtype=torch.bfloat16
            )
        result = {"families": families, "run": compared_run(), "inference": compared_inference()}
    Path(sys.argv[1]).write_text(json.dumps(result))


def family(
    case: str,
    kind: str,
    *,
    checkpointing: bool = False,
    dtype: torch.dtype = torch.float32,
) -> dict[str, float]:
    """Distance of a packed batch's loss and gradients from the CPU's, and the number of waits."""
    with tempfile.TemporaryDirectory() as name:
        folder = save_family(Path(name), case)
        base = load_unsharded(folder, "int8", checkpointing)
        use_matmul(base, kind, OUTLIERS)
        step = PackedStep.of(case, base)
        expected, wanted = step.gradients(base, *step.on(CPU))
        with other_device() as device:
            there = load_unsharded(folder, "int8", checkpointing, dtype, device)
            use_matmul(there, kind, OUTLIERS)
            batch, prompts = step.on(device)
            Waits.count = 0
            loss, gradients = step.gradients(there, batch, prompts)
            waits = Waits.count
            found = float(loss), [gradient.cpu() for gradient in gradients]
    return {
        "loss": abs(found[0] / float(expected) - 1),
        "gradient": max(errors(found[1], wanted)),
        "waits": waits,
        "padded": not base.packed,
        "layers_of_experts": sum(isinstance(module, FrozenExperts) for module in base.modules()),
    }


def compared_run() -> dict[str, Any]:
    """Run search, steps, scoring and generation on the CPU and on the device."""
    expected = trained(load_unsharded(TINY, "int8"), CPU)
    with other_device() as device:
        result = trained(load_unsharded(TINY, "int8", device=device), device, lambda: Waits.count)
    prompts = dict(
        zip(
            (p["name"] for p in PROMPTS),
            errors(result["prompts"], expected["prompts"]),
            strict=True,
        )
    )
    return {
        "prompts": prompts,
        "scores": [expected["scores"], result["scores"]],
        "texts": [expected["texts"], result["texts"]],
        "inspected": [expected["inspected"], result["inspected"]],
        "waits": result["waits"],
        "batches": result["batches"],
    }


def compared_inference() -> list[dict[str, Any]]:
    """Answer requests and compare texts on the CPU and on the device."""
    expected = answered(load_unsharded(TINY, "int8"), CPU)
    with other_device() as device:
        return [expected, answered(load_unsharded(TINY, "int8", device=device), device)]


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # torch's threads for a device that is not there do not end
