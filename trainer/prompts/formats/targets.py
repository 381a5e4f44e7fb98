"""The table of targets, and the function that writes an exported folder."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from trainer.prompts.formats.exported_prompt import ExportedPrompt
from trainer.prompts.formats.llama_cpp_format import LLAMA_CPP
from trainer.prompts.formats.npz_format import NPZ
from trainer.prompts.formats.peft_format import PEFT
from trainer.prompts.formats.sglang_format import SGLANG
from trainer.prompts.formats.target import Target
from trainer.prompts.formats.target_names import TARGET_NAMES, check_target_name
from trainer.prompts.formats.tensorrt_llm_format import TENSORRT_LLM
from trainer.prompts.formats.vllm_format import VLLM
from trainer.runtime.errors import BadInput

TARGETS: dict[str, Target] = {
    target.name: target for target in (PEFT, VLLM, SGLANG, TENSORRT_LLM, LLAMA_CPP, NPZ)
}
assert tuple(TARGETS) == TARGET_NAMES


def find_target(name: str) -> Target:
    """Return a target; raises ``BadInput`` if there is none with this name."""
    check_target_name(name)
    return TARGETS[name]


def write_folder(
    target: Target, prompt: ExportedPrompt, out: Path, check: Callable[[Path], None]
) -> None:
    """Write the folder ``out`` for a target: all of its files, or nothing.

    Args:
        check: raises ``BadInput`` if the written files are not usable.

    Raises:
        BadInput: ``out`` exists, or the target cannot express the prompt.
    """
    if os.path.lexists(out):
        raise BadInput(f"{out}: already exists; give a new folder")
    if problems := [f"--to {target.name}: {problem}" for problem in target.problems(prompt)]:
        raise BadInput(problems)
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        target.write(prompt, folder)
        check(folder)
        folder.chmod(0o777 & ~_umask())
        folder.rename(out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
