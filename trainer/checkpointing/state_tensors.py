"""Separate the tensors of a ``state_dict`` from its JSON, and join them again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def split_tensors(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of nested dicts, named by their keys joined with ``/``, and the rest."""
    tensors: dict[str, Tensor] = {}
    rest: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, Tensor):
            tensors[key] = value
        elif isinstance(value, Mapping):
            inner, rest[key] = split_tensors(value)
            tensors |= {f"{key}/{name}": tensor for name, tensor in inner.items()}
        else:
            rest[key] = value
    return tensors, rest


def join_tensors(tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> dict[str, Any]:
    """Return the nested dicts that ``split_tensors`` separated.

    A tensor is put into the innermost dict of ``rest`` on the path that its name spells.
    """
    state = {k: join_tensors({}, v) if isinstance(v, Mapping) else v for k, v in rest.items()}
    for name, tensor in tensors.items():
        target, key = state, name
        while isinstance(target.get(first := key.partition("/")[0]), dict) and first != key:
            target, key = target[first], key.partition("/")[2]
        target[key] = tensor
    return state
