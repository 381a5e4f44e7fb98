"""The JSON part of a checkpoint as types, checked before anything is built on it.

Checksums find files that changed; they do not find JSON that is whole and means something else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from trainer.training.loop import TrainingProgress

Count = Annotated[int, Field(ge=0)]


class _Part(BaseModel):
    """Keys that are not named here belong to a newer version, or are compared elsewhere."""

    model_config = ConfigDict(strict=True, extra="allow")


class _Optimizer(_Part):
    updates: Count
    scale: float


class _Reader(_Part):
    step: Count


class _Prompt(_Part):
    active: bool
    optimizer: _Optimizer
    reader: _Reader | None = None


class _Bank(_Part):
    prompts: dict[str, _Prompt]


class _Stopping(_Part):
    best_step: Count | None
    waited: Count


class _Cursor(_Part):
    epoch: Count
    position: Count
    ahead: list[Count]


class _Stopped(_Part):
    step: Count
    reason: str


class _Loop(_Part):
    progress: dict[str, Any]
    stopping: dict[str, _Stopping]
    feed: list[_Cursor]


class _Chosen(_Part):
    where: dict[str, Any]
    matmul: str
    shard_group: Count
    kept_bytes: Count
    stream_tokens: Count
    ramp: list[float]
    gradient_checkpointing: bool


class _Encoders(_Part):
    identity: dict[str, Any]
    bank: _Bank


class _State(_Encoders):
    loop: _Loop
    chosen: _Chosen


_PROGRESS = TypeAdapter(TrainingProgress)
_BASELINES = TypeAdapter(dict[str, dict[str, Any]])
_STOPPED = TypeAdapter(dict[str, _Stopped])


def problem_of_encoders(step: int, state: Mapping[str, Any]) -> str | None:
    """As ``problem_of``, of the part that making prompts with a trained encoder needs."""
    try:
        _Encoders.model_validate(state)
    except ValidationError as error:
        return _first(error)
    return None


def problem_of(step: int, state: Mapping[str, Any]) -> str | None:
    """Say what in the state of a checkpoint is not as ``resume.snapshot`` writes it; else None.

    Args:
        step: of the checkpoint.
        state: after a round through JSON.
    """
    try:
        found = _State.model_validate(state)
        saved = found.loop.progress
        # Strict JSON, not Python: there a tuple may not be a list.
        progress = _PROGRESS.validate_json(json.dumps(saved), strict=True)
        _BASELINES.validate_python(progress.baselines)
        _STOPPED.validate_python(progress.stopped)
    except ValidationError as error:
        return _first(error)
    if unknown := saved.keys() - {field.name for field in fields(TrainingProgress)}:
        return f"loop.progress: unknown {', '.join(sorted(unknown))}"
    if progress.step != step:
        return f"loop.progress.step: is {progress.step}"
    if len(found.loop.feed) != len(found.bank.prompts):
        return f"loop.feed: {len(found.loop.feed)} for {len(found.bank.prompts)} prompts"
    if missing := found.bank.prompts.keys() - found.loop.stopping.keys():
        return f"loop.stopping: has no {', '.join(sorted(missing))}"
    counts = [progress.useful_tokens, *progress.prompt_tokens.values(), progress.validations]
    return "loop.progress: a count is negative" if min(counts) < 0 else None


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'state'}: {first['msg']}"
