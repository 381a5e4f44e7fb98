"""PEFT: virtual tokens as PROMPT_TUNING; keys and values as PREFIX_TUNING or CARTRIDGE.

CARTRIDGE (PEFT 0.20 and newer, ``peft/tuners/cartridge``) stores keys and values in the layout of
PREFIX_TUNING: ``prompt_embeddings`` [P, L * 2 * A * D]. Unlike PREFIX_TUNING, it can be trained
further with its first ``num_frozen_tokens`` tokens frozen. The export freezes none.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from trainer.prompts.formats.exported_prompt import ExportedPrompt
from trainer.prompts.formats.target import Target
from trainer.prompts.saved_prompts import SEGMENT, SETTINGS, WEIGHTS
from trainer.runtime import atomic_io
from trainer.runtime.json_file import read_json_object

#: First release of PEFT with CARTRIDGE.
_CARTRIDGE_RELEASE = (0, 20)
CARD = "README.md"


def installed_peft() -> tuple[int, int] | None:
    """Return the installed release of PEFT; None without PEFT."""
    try:
        major, minor = version("peft").split(".")[:2]
        return int(major), int(minor)
    except (PackageNotFoundError, ValueError):
        return None


@dataclass(frozen=True)
class _Peft(Target):
    def problems(self, prompt: ExportedPrompt) -> Iterator[str]:
        if prompt.peft_type is not None and not prompt.is_prefix:
            yield (
                f"--peft-type {prompt.peft_type}: {prompt.name!r} has virtual tokens, which are "
                "PEFT's PROMPT_TUNING; leave --peft-type out"
            )
        release = installed_peft()
        if prompt.peft_type == "cartridge" and release and release < _CARTRIDGE_RELEASE:
            installed = ".".join(map(str, release))
            yield (
                f"--peft-type cartridge: PEFT {installed} is installed, and CARTRIDGE needs 0.20; "
                "pip install --upgrade peft, or use --peft-type prefix_tuning"
            )


def _write(prompt: ExportedPrompt, folder: Path) -> None:
    """Copy the adapter of the run; only the type of keys and values can change."""
    for name in (SETTINGS, WEIGHTS, SEGMENT):
        if (prompt.adapter / name).is_file():
            shutil.copyfile(prompt.adapter / name, folder / name)
    if (prompt.adapter / CARD).is_file():
        card = (prompt.adapter / CARD).read_text("utf-8")
        # The lines that load the adapter name its folder.
        before, after = (repr(str(path.resolve())) for path in (prompt.adapter, prompt.out))
        atomic_io.write(folder / CARD, card.replace(before, after))
    if prompt.peft_type != "cartridge":
        return
    settings = read_json_object(folder / SETTINGS)
    for setting in ("prefix_projection", "encoder_hidden_size"):
        settings.pop(setting, None)
    settings |= {"peft_type": "CARTRIDGE", "num_frozen_tokens": 0}
    atomic_io.write_json(folder / SETTINGS, settings)
    if (folder / CARD).is_file():
        card = (folder / CARD).read_text("utf-8").replace("prefix-tuning", "cartridge", 1)
        atomic_io.write(folder / CARD, card)


PEFT = _Peft("peft", "PEFT", _write, takes_prefixes=True, families=None)
