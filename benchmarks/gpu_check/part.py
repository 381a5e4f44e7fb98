"""Program: one part of the check.

    python -m benchmarks.gpu_check.part NAME FOLDER [--small]

Writes FOLDER/NAME.json. With ``--small`` it runs without a GPU: products on the simulated device of
``tests/other_device.py``, everything else on the CPU. Libraries are imported by the parts.
"""

from __future__ import annotations

import importlib
import json
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.runtime.process import die_with_parent, flush_and_exit

if TYPE_CHECKING:
    import torch

    from benchmarks.gpu_check.sizes import Sizes

Result = dict[str, Any]


@dataclass(frozen=True)
class Check:
    """What a part gets.

    Attributes:
        folder: shared by the parts; removed at the end.
        small: small sizes, without a GPU.
    """

    name: str
    folder: Path
    small: bool

    @property
    def sizes(self) -> Sizes:
        from benchmarks.gpu_check.sizes import FULL, SMALL

        return SMALL if self.small else FULL

    @property
    def device(self) -> torch.device:
        import torch

        return torch.device("cpu" if self.small else "cuda")

    @contextmanager
    def kernel_device(self) -> Iterator[torch.device]:
        """Provide the GPU, or the simulated device in its place."""
        if not self.small:
            yield self.device
            return
        from tests.other_device import other_device

        with other_device() as device:
            yield device

    def save(self, result: Result) -> None:
        """Write the result, also an incomplete one, which a part keeps if it fails later."""
        (self.folder / f"{self.name}.json").write_text(json.dumps(result))


@dataclass(frozen=True)
class Part:
    """One part of the check.

    Attributes:
        about: description in the report.
        seconds: time limit.
        run: module and function of this package. The function gets a ``Check``, saves its results
            there, and raises if the part fails.
        needs: another part, without which this one is skipped.
    """

    name: str
    about: str
    seconds: int
    run: str
    needs: str | None = None


def _training(name: str, about: str) -> Part:
    return Part(name, about, 90, "training.train", needs="base")


#: In this order: what matters most comes first, in case the time runs out.
PARTS = [
    Part(
        "card", "name of the card; speed of a large product in bf16 and in int8", 40, "kernels.card"
    ),
    Part("products", "frozen linear layers with each kind of product", 75, "kernels.products"),
    Part("attention", "FlexAttention and bucketed attention", 75, "attention.attention"),
    Part("out_of_memory", "a step that does not fit is split", 60, "out_of_memory.out_of_memory"),
    Part("tests", "tests/gpu", 240, "run_tests.run_tests"),
    Part("base", "write an int8 base of 8B shape with random weights", 60, "training.write_base"),
    _training("train_int8", "1 prompt, base.matmul: int8"),
    _training("train_bank", "16 prompts in one run, with the tokens per step of train_int8"),
    _training("train_one", "1 prompt with the tokens per step of one of the 16"),
    _training("train_dequantize", "1 prompt, base.matmul: dequantize"),
    _training("train_flex", "1 prompt, engine.attention: flex"),
]


def main() -> None:
    die_with_parent()
    name, folder, *options = sys.argv[1:]
    (part,) = (part for part in PARTS if part.name == name)
    module, function = part.run.split(".")
    run = getattr(importlib.import_module(f"benchmarks.gpu_check.{module}"), function)
    run(Check(name, Path(folder), options == ["--small"]))


if __name__ == "__main__":
    code = 1
    try:
        main()
        code = 0
    except BaseException:
        traceback.print_exc()
    flush_and_exit(code)  # threads of libraries abort in a usual end
