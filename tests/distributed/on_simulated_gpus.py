"""Rank program: a program of the trainer, on the simulated device.

python -m tests.distributed.on_simulated_gpus MODULE ARGUMENTS
"""

from __future__ import annotations

import importlib
import sys

from tests.simulated_accelerator import simulated_accelerator
from trainer.runtime.process import flush_and_exit


def main() -> int:
    module, *arguments = sys.argv[1:]
    program = importlib.import_module(module)
    with simulated_accelerator():
        code: int = program.main(arguments)
    return code


if __name__ == "__main__":
    flush_and_exit(main())
