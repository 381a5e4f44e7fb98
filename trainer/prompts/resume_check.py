"""Compare the prompts of a run with those of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from trainer.config import Prompt

_REMEDY = "continue with the settings of the checkpoint, or give another output_dir"


def resume_settings(prompt: Prompt) -> dict[str, Any]:
    """Return the settings of a prompt that must not change on resume."""
    return {
        "task": prompt.task,
        "method": prompt.method,
        "encoder": prompt.encoder_name,
        "share": prompt.share,
        "num_virtual_tokens": prompt.num_virtual_tokens,
    }


def checkpoint_problems(
    prompts: Sequence[Prompt],
    parameters: Mapping[str, Mapping[str, Tensor]],
    saved: Mapping[str, Any],
) -> list[str]:
    """Return every difference between the prompts of a run and those of a checkpoint.

    Args:
        parameters: prompt -> the parameters that ``Bank.state_dict`` stores with it.
        saved: ``Bank.state_dict()`` of the checkpoint.
    """
    problems = []
    names = [prompt.name for prompt in prompts]
    if set(names) != set(saved):
        problems.append(
            f"prompts: the run file has {', '.join(names)}, the checkpoint "
            f"{', '.join(saved)}; {_REMEDY}"
        )
    for prompt in prompts:
        name = prompt.name
        if name not in saved:
            continue
        settings = resume_settings(prompt)
        changed = {k: v for k, v in settings.items() if saved[name].get(k) != v}
        problems += [
            f"prompts.{name}.{key}: {value!r}, but the checkpoint has {saved[name].get(key)!r}; "
            f"{_REMEDY}"
            for key, value in changed.items()
        ]
        if changed:
            continue
        ours = {k: tuple(v.shape) for k, v in parameters.get(name, {}).items()}
        theirs = {
            k.removeprefix("encoder/"): tuple(v.shape)
            for k, v in saved[name].items()
            if k.startswith("encoder/")
        }
        if theirs and not ours:
            problems.append(
                f"prompts.{name}: was the first prompt of share {prompt.share!r} in the run that "
                "wrote the checkpoint; list the prompts of this share in the same order again"
            )
        elif ours != theirs and (theirs or prompt.share is None):
            problems.append(
                f"prompts.{name}: its parameters are {ours}, but the checkpoint has {theirs}; "
                f"the base or encoder_hidden_size has changed; {_REMEDY}"
            )
    return problems
