"""Defaults of a prompt that depend on its other settings: learning rate, optimizer, preset."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.config.encoders import find_encoder
from trainer.config.types import is_true

#: Default of Muon. Lower than usual: in short runs, a prompt learns faster with less momentum.
DEFAULT_MOMENTUM = 0.5
#: Default of AdamW. Lower than torch's (0.9, 0.999), because the gradients of a prompt soon become
#: far smaller than the first ones.
DEFAULT_BETAS = (0.8, 0.99)
#: Default learning rate if relative_learning_rate does not apply.
DEFAULT_RATE = 3.0e-3
#: Recipes from the literature. Settings in the run file override them. Learning rate and clipping
#: suit the recipe's optimizer only.
PRESETS: dict[str, dict[str, Any]] = {
    # Lester et al. 2021, arXiv 2104.08691, section 3. No clipping: Adafactor clips its own updates.
    "lester": {
        "optimizer": "adafactor",
        "learning_rate": 0.3,
        "schedule": "constant",
        "warmup_ratio": 0.0,
        "weight_decay": 1.0e-5,
        "max_grad_norm": None,
    },
}


def with_defaults(value: Mapping[str, Any]) -> dict[str, Any]:
    """Return a prompt's settings with its preset, learning rate and optimizer filled in."""
    preset = value.get("preset")
    filled = dict(PRESETS[preset]) if isinstance(preset, str) and preset in PRESETS else {}
    if filled and value.get("optimizer") not in (None, filled["optimizer"]):
        del filled["learning_rate"], filled["max_grad_norm"]
    rates = ("learning_rate", "relative_learning_rate")
    if any(value.get(rate) is not None for rate in rates):
        filled.pop("learning_rate", None)
    elif "learning_rate" not in filled:
        entry, init = find_encoder(value.get("method"), value.get("encoder")), value.get("init")
        zero = init == "zero" or (isinstance(init, dict) and is_true(init.get("zero")))
        share = None if entry is None or zero else entry.relative_learning_rate
        if value.get("optimizer") != "sgd":  # sgd has no default: see Prompt._check_training
            filled |= {rates[0]: DEFAULT_RATE} if share is None else {rates[1]: share}
    filled |= _optimizer(filled | {k: v for k, v in value.items() if v is not None})
    left_open = {*rates, "optimizer", "momentum", "betas"}
    return filled | {k: v for k, v in value.items() if k not in left_open or v is not None}


def _optimizer(value: Mapping[str, Any]) -> dict[str, Any]:
    entry = find_encoder(value.get("method"), value.get("encoder"))
    trains_values = entry is not None and entry.trains_values
    own = "muon" if trains_values and value.get("betas") is None else "adamw"
    name = value.get("optimizer") or own
    if name == "muon":
        return {"optimizer": name, "momentum": DEFAULT_MOMENTUM}
    return {"optimizer": name} | ({"betas": DEFAULT_BETAS} if name == "adamw" else {})
