"""Report the measurements of ``inspect`` as JSON, warnings and tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from trainer.commands.inspect.weights import OUTLIER_RATIO, WeightError, relative_error
from trainer.config import Base
from trainer.runtime.console import Console

#: Version of the JSON; increase when a key is removed or changes its meaning.
SCHEMA = 1
#: Relative error of a layer's weights, and relative change of a loss, above which to warn.
WEIGHT_LIMIT, LOSS_LIMIT = 0.02, 0.01
#: Smaller changes of a loss, in nats per token, cause no warning.
LOSS_FLOOR = 1e-3

REMEDIES = {
    "embeddings": "base.embeddings=keep leaves them unquantized",
    "head": "base.head=keep leaves it unquantized",
    "embeddings and head": "base.embeddings=keep base.head=keep leave them unquantized",
}
#: This setting multiplies the int8 weights exactly; its error comes only from rounding them.
EXACT_INT8 = "int8/dequantize"


def collect_findings(
    settings: Base, errors: Sequence[WeightError], losses: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return all measurements, and the warnings about them, as JSON values."""
    base = settings.model_dump(include={"model", "revision", "embeddings", "head"})
    base["stored_int8"] = any(error.squared_error is None for error in errors)
    weights = weight_findings(errors)
    return {
        "schema": SCHEMA,
        "base": base,
        "weights": weights,
        "losses": losses,
        "warnings": warnings(base, weights, losses),
    }


def weight_findings(errors: Sequence[WeightError]) -> dict[str, Any]:
    """Return errors of all weights and their groups (layers, embeddings, head), in model order.

    An error is None if the checkpoint itself is int8, because there is no original to compare with.
    """
    groups: dict[str, list[WeightError]] = {}
    for error in errors:
        groups.setdefault(error.group, []).append(error)
    return {
        "relative_error": relative_error(errors),
        "outlier_ratio": OUTLIER_RATIO,
        "groups": [_group(name, members) for name, members in groups.items()],
        "tensors": [
            {
                "name": error.name,
                "group": error.group,
                "shape": list(error.shape),
                "relative_error": error.relative_error,
                "largest_row_error": error.largest_row_error,
                "outlier_row_share": error.outlier_rows / error.rows,
            }
            for error in errors
        ],
    }


def _group(name: str, errors: Sequence[WeightError]) -> dict[str, Any]:
    compared = [error for error in errors if error.relative_error is not None]
    worst = max(compared, key=lambda error: error.relative_error or 0.0, default=None)
    return {
        "name": name,
        "relative_error": relative_error(errors),
        "worst_tensor": worst.name if worst else None,
        "worst_tensor_error": worst.relative_error if worst else None,
        "largest_row_error": max((e.largest_row_error or 0.0 for e in compared), default=None),
        "outlier_row_share": sum(e.outlier_rows for e in errors) / sum(e.rows for e in errors),
    }


def warnings(
    base: Mapping[str, Any], weights: Mapping[str, Any], losses: Mapping[str, Any] | None
) -> list[str]:
    """Return a warning with its remedy for every error that is too large."""
    ends = [f"base.{end}=keep" for end in ("embeddings", "head") if base[end] == "int8"]
    remedy = " or ".join([*([" ".join(ends)] if ends else []), "base.quantization=none"])
    return [*_weight_warnings(weights), *_loss_warnings(losses, remedy)]


def _weight_warnings(weights: Mapping[str, Any]) -> Iterator[str]:
    beyond = [g for g in weights["groups"] if (g["relative_error"] or 0.0) > WEIGHT_LIMIT]
    layers = [group for group in beyond if group["name"] not in REMEDIES]
    for group in beyond:
        if group not in layers:
            yield (
                f"{group['name']}: relative error {group['relative_error']:.4f} in int8, more than "
                f"{WEIGHT_LIMIT}; {REMEDIES[group['name']]}"
            )
    if layers:
        worst = max(layers, key=lambda group: float(group["relative_error"]))
        others = f" and {len(layers) - 1} more" if len(layers) > 1 else ""
        yield (
            f"{worst['name']}{others}: relative error up to {worst['relative_error']:.4f} in int8, "
            f"more than {WEIGHT_LIMIT} (worst: {worst['worst_tensor']}); if losses change too, "
            "base.quantization=none keeps all layers unquantized"
        )


def _loss_warnings(losses: Mapping[str, Any] | None, remedy: str) -> Iterator[str]:
    """Yield one warning for each setting and task, for the prompt whose loss changes most."""
    if losses is None:
        return
    reference = losses["reference"]
    for setting in losses["settings"]:
        name = setting["name"]
        if name == reference or setting["left_out"]:
            continue
        for task, readers in groupby(losses["readers"], key=lambda reader: str(reader["task"])):
            large = [reader for reader in readers if _is_large_change(reader, name, reference)]
            if not large:
                continue
            changes = [loss_change(reader, name, reference) or 0.0 for reader in large]
            change, reader = max(zip(changes, large, strict=True), key=lambda pair: abs(pair[0]))
            in_weights = _is_large_change(reader, EXACT_INT8, reference)
            yield (
                f"task {task}, {reader_name(reader)}: the loss with {name} differs by "
                f"{change:+z.1%} from {reference}, more than {LOSS_LIMIT:.0%}; remedy: "
                f"{remedy if in_weights else 'base.matmul=dequantize'}"
            )


def loss_change(reader: Mapping[str, Any], setting: str, reference: str) -> float | None:
    """Relative change of a loss against the reference; infinite if the loss is not finite."""
    scores = reader["scores"]
    if setting not in scores or reference not in scores or scores[reference]["loss"] is None:
        return None
    loss, before = scores[setting]["loss"], scores[reference]["loss"]
    return float("inf") if loss is None else (loss - before) / max(before, 1e-12)


def _is_large_change(reader: Mapping[str, Any], setting: str, reference: str) -> bool:
    change = loss_change(reader, setting, reference)
    if change is None:
        return False
    loss, before = reader["scores"][setting]["loss"], reader["scores"][reference]["loss"]
    return abs(change) > LOSS_LIMIT and (loss is None or abs(loss - before) > LOSS_FLOOR)


def reader_name(reader: Mapping[str, Any]) -> str:
    if reader["kind"] == "no_prompt":
        return "no prompt"
    return f"{reader['kind'].replace('_', '-')}: {reader['name'].strip()}"


def show(findings: Mapping[str, Any], console: Console) -> None:
    """Print the tables and the warnings."""
    _show_weights(findings["base"], findings["weights"], console)
    if findings["losses"]:
        _show_losses(findings["losses"], console)
    for text in findings["warnings"]:
        console.warn(text)


def _show_weights(base: Mapping[str, Any], weights: Mapping[str, Any], console: Console) -> None:
    total = weights["relative_error"]
    if base["stored_int8"]:
        console.print(
            f"{base['model']} is stored in int8, so there are no original weights to compare with; "
            "inspect the model that it was made from"
        )
    columns = ["", "relative error", "worst tensor", "its error", "worst row", "outlier rows"]
    rows = [
        [
            group["name"],
            _number(group["relative_error"]),
            _inside(group["worst_tensor"]),
            _number(group["worst_tensor_error"]),
            _number(group["largest_row_error"]),
            f"{group['outlier_row_share']:.2%}",
        ]
        for group in weights["groups"]
    ]
    if total is None:  # some weights have no original
        kept = [i for i in range(len(columns)) if i in (0, 5) or any(row[i] for row in rows)]
        columns, rows = [columns[i] for i in kept], [[row[i] for i in kept] for row in rows]
    total_error = "" if total is None else f", relative error {total:.4f}"
    console.table(f"weights of {base['model']} in int8{total_error}", columns, rows)
    console.print(
        f"outlier rows: largest weight above {weights['outlier_ratio']:.0f} times the row's root "
        "mean square"
    )


def _inside(name: str | None) -> str:
    """Return the part of a parameter's name after its layer number."""
    path = (name or "").split(".")
    numbers = [i for i, part in enumerate(path) if part.isdigit()]
    return ".".join(path[numbers[0] + 1 :] if numbers else path[-1:])


def _show_losses(losses: Mapping[str, Any], console: Console) -> None:
    reference = losses["reference"]
    shown = [setting["name"] for setting in losses["settings"] if not setting["left_out"]]
    for task, group in groupby(losses["readers"], key=lambda reader: str(reader["task"])):
        readers = list(group)
        scored = "accuracy" in readers[0]["scores"][reference]
        columns = ["", "quantization/matmul", "loss", "change", *(["accuracy"] if scored else [])]
        rows = []
        for reader in readers:
            for name in shown:
                scores = reader["scores"][name]
                change = None if name == reference else loss_change(reader, name, reference)
                rows.append(
                    [
                        reader_name(reader) if name == shown[0] else "",
                        name,
                        "not finite" if scores["loss"] is None else _number(scores["loss"]),
                        "" if change is None else f"{change:+z.2%}",
                        *([_number(scores["accuracy"])] if scored else []),
                    ]
                )
        console.table(f"{task}: {readers[0]['rows']} validation rows", columns, rows)
    for setting in losses["settings"]:
        if setting["left_out"]:
            console.print(f"{setting['name']}: left out: {setting['left_out']}")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
