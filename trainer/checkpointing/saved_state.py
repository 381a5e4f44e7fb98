"""Validate the JSON of a checkpoint against the types that a run writes.

Checksums detect damaged files, but not intact files with other content.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from trainer.training.progress import TrainingProgress

Count = Annotated[int, Field(ge=0)]


class _Section(BaseModel):
    """Additional keys are allowed: they are of a newer version, or checked elsewhere."""

    model_config = ConfigDict(strict=True, extra="allow")


class _Optimizer(_Section):
    updates: Count
    scale: float


class _Reader(_Section):
    step: Count


class _Prompt(_Section):
    active: bool
    optimizer: _Optimizer
    reader: _Reader | None = None


class _Bank(_Section):
    prompts: dict[str, _Prompt]


class _Stopping(_Section):
    best_step: Count | None
    waited: Count


class _Cursor(_Section):
    epoch: Count
    position: Count
    ahead: list[Count]


class _Stopped(_Section):
    step: Count
    reason: str


class _Loop(_Section):
    progress: dict[str, Any]
    stopping: dict[str, _Stopping]
    feed: list[_Cursor]


class _Chosen(_Section):
    where: dict[str, Any]
    matmul: str
    shard_group: Count
    kept_bytes: Count
    stream_tokens: Count
    ramp: list[float]
    gradient_checkpointing: bool


class _Encoders(_Section):
    identity: dict[str, Any]
    bank: _Bank


class _State(_Encoders):
    loop: _Loop
    chosen: _Chosen


_PROGRESS = TypeAdapter(TrainingProgress)
_BASELINES = TypeAdapter(dict[str, dict[str, Any]])
_STOPPED = TypeAdapter(dict[str, _Stopped])


def problem_of_encoders(step: int, state: Mapping[str, Any]) -> str | None:
    """As ``problem_of``, for the sections that ``promptshard export`` reads."""
    try:
        _Encoders.model_validate(state)
    except ValidationError as error:
        return _first(error)
    return None


def problem_of(step: int, state: Mapping[str, Any]) -> str | None:
    """Return how a step's JSON differs from what ``take_run_snapshot`` writes; None if valid."""
    try:
        valid = _State.model_validate(state)
        saved = valid.loop.progress
        # As JSON: strict validation of Python values would refuse a list for a tuple.
        progress = _PROGRESS.validate_json(json.dumps(saved), strict=True)
        _BASELINES.validate_python(progress.baselines)
        _STOPPED.validate_python(progress.stopped)
    except ValidationError as error:
        return _first(error)
    if unknown := saved.keys() - {field.name for field in fields(TrainingProgress)}:
        return f"loop.progress: unknown {', '.join(sorted(unknown))}"
    if progress.step != step:
        return f"loop.progress.step: is {progress.step}"
    if len(valid.loop.feed) != len(valid.bank.prompts):
        return f"loop.feed: {len(valid.loop.feed)} for {len(valid.bank.prompts)} prompts"
    if missing := valid.bank.prompts.keys() - valid.loop.stopping.keys():
        return f"loop.stopping: missing {', '.join(sorted(missing))}"
    counts = [progress.useful_tokens, *progress.prompt_tokens.values(), progress.validations]
    return "loop.progress: a count is negative" if min(counts) < 0 else None


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'state'}: {first['msg']}"
