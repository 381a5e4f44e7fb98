"""Print an inspection on the terminal, in tables of at most 80 characters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from trainer.reporting.inspection import (
    Elicited,
    Inspection,
    NearestToken,
    PromptInspection,
    PrunedPrompt,
    Similarity,
    TokenInspection,
    decimals,
    losses_without,
)
from trainer.reporting.terminal_table import shorten
from trainer.runtime.console import Console

NONE = "–"
#: Virtual tokens of a table; of longer prompts, those with the largest effect are shown.
MOST_TOKENS = 40
#: Characters of a nearest token, of an elicited text in a table, and of names.
TOKEN_WIDTH, TEXT_WIDTH, NAME_WIDTH = 13, 36, 24
#: Nearest tokens in the table.
SHOWN = 2
#: Prompts of a map of similarities, which has one column per prompt; of more, pairs are shown.
MOST_PROMPTS, PAIRS = 6, 10
READING = (
    "left out: change of the loss without this token, with 95% interval, paired by row; positive: "
    "the token helps. attention: share that the positions that predict the answer give to it, mean "
    "over heads and layers. grad x input: gradient times value; negative: a larger token lowers "
    "the loss."
)
SPACE_READING = (
    "norm: share of the vocabulary with a smaller one. drift: distance from the start, in mean "
    "norms of the vocabulary. most like: the other virtual token with the largest cosine. A dot in "
    "a token is a space."
)
ELICITED_READING = (
    "class rate: share of the task's class names in the text that the base writes about the hidden "
    "states of the prompt (InSPEcT, Ramati et al. 2024): in the best text and the mean of all "
    "pairs of layers. It has a meaning only as far as it is above its controls."
)


def show(inspection: Inspection, console: Console) -> None:
    """Print all prompts, their similarity, and how to read it."""
    for name, prompt in inspection.prompts.items():
        _show_prompt(name, prompt, console)
    _show_similarity(inspection.similarity, console)
    if any(prompt.kind != "prefix" for prompt in inspection.prompts.values()):
        console.print()
        console.paragraph(inspection.remark)


def _show_prompt(name: str, prompt: PromptInspection, console: Console) -> None:
    size = f"{len(prompt.tokens)} virtual token{'' if len(prompt.tokens) == 1 else 's'}"
    text = f"{name}: {size} for task {prompt.task}, {prompt.rows:,} rows"
    text += "" if prompt.loss is None else f", loss {prompt.loss:.4f}"
    name = shorten(name, NAME_WIDTH, 4)
    tokens = _shown(prompt.tokens)
    console.print()
    console.paragraph(text)
    columns, rows = effect_table(tokens)
    console.table(f"{name}: what each virtual token does", columns, rows, wrap=False)
    console.paragraph(READING)
    if left := len(prompt.tokens) - len(tokens):
        console.print(f"{left} virtual tokens with less effect: see inspection.json")
    if prompt.kind != "prefix":
        console.print()
        columns, rows = space_table(tokens)
        console.table(f"{name}: nearest tokens by cosine", columns, rows, left=2, wrap=False)
        console.paragraph(SPACE_READING)
    _show_controls(name, prompt, console)
    if prompt.checkpoints:
        console.print()
        columns, rows = checkpoint_table(prompt)
        left = 1 if prompt.kind == "prefix" else 2
        console.table(f"{name}: at checkpoints", columns, rows, left=left, wrap=False)
    if prompt.pruned is not None:
        console.print()
        console.paragraph(pruned_text(name, prompt.pruned))
    for note in prompt.notes:
        console.paragraph(f"note: {note}", 2)


def _shown(tokens: Sequence[TokenInspection]) -> list[TokenInspection]:
    if len(tokens) <= MOST_TOKENS:
        return list(tokens)
    largest = sorted(tokens, key=lambda token: -abs(token.leave_one_out or 0))[:MOST_TOKENS]
    return sorted(largest, key=lambda token: token.index)


def effect_table(tokens: Sequence[TokenInspection]) -> tuple[list[str], list[list[str]]]:
    """Return columns and cells of what each virtual token does."""
    is_prefix = any(token.key_norm is not None for token in tokens)
    of_effect = decimals([token.gradient_times_input for token in tokens])
    rows = []
    for token, left_out in zip(tokens, losses_without(tokens), strict=True):
        mean, peak = _attention(token)
        norms = [_number(token.key_norm), _number(token.value_norm)]
        effect = _signed(token.gradient_times_input, of_effect)
        rows.append(
            [
                str(token.index),
                left_out or NONE,
                mean,
                *([] if is_prefix else [peak]),
                effect,
            ]
            + (norms if is_prefix else [])
        )
    columns = ["token", "left out", "attention", "peak layer", "grad x input"]
    if is_prefix:
        columns = [name for name in columns if name != "peak layer"] + ["key norm", "value norm"]
    return columns, rows


def _attention(token: TokenInspection) -> tuple[str, str]:
    layers = [(share, i) for i, share in enumerate(token.attention or []) if share is not None]
    if not layers:
        return NONE, NONE
    share, layer = max(layers)
    return f"{sum(share for share, _ in layers) / len(layers):.1%}", f"{layer}: {share:.1%}"


def space_table(tokens: Sequence[TokenInspection]) -> tuple[list[str], list[list[str]]]:
    """Return columns and cells of where each virtual token is among the vocabulary."""
    rows = []
    for token in tokens:
        nearest = ", ".join(
            f"{_quoted(near.token)} {near.cosine:.2f}" for near in token.nearest[:SHOWN]
        )
        norm = NONE if token.norm_percentile is None else f"{token.norm_percentile:.0f}%"
        like = NONE
        if token.redundancy is not None:
            like = f"{token.redundant_with}: {token.redundancy:.2f}"
        rows.append([str(token.index), nearest, norm, _number(token.drift), like])
    return ["token", "nearest", "norm", "drift", "most like"], rows


def _quoted(token: str) -> str:
    """Write a token between quotes, with dots for spaces and escapes for line breaks."""
    text = token.encode("unicode_escape").decode() if not token.isprintable() else token
    return f"“{shorten(text.replace(' ', '·'), TOKEN_WIDTH, 1)}”"


def _show_controls(name: str, prompt: PromptInspection, console: Console) -> None:
    compared = list(_compared(name, prompt))
    console.print()
    columns, rows = ["prompt", "loss", "class rate", "mean of all"], []
    for label, loss, elicited, _ in compared:
        rows.append(
            [
                label,
                _number(loss, 4),
                _number(elicited.class_rate),
                _number(elicited.mean_class_rate),
            ]
        )
    if prompt.class_rate is None:
        columns, rows = columns[:2], [row[:2] for row in rows]
    console.table(f"{name} and its controls", columns, rows, wrap=False)
    if prompt.class_rate is not None:
        console.paragraph(ELICITED_READING)
    if prompt.kind == "prefix":
        return
    for title, texts in (
        ("nearest token of every virtual token:", [_joined(near) for *_, near in compared]),
        ("elicited:", [_text(elicited) for _, _, elicited, _ in compared]),
    ):
        console.print(title)
        for (label, *_), text in zip(compared, texts, strict=True):
            console.paragraph(f"  {label}: {text}", 4)


def _compared(
    name: str, prompt: PromptInspection
) -> Iterator[tuple[str, float | None, Elicited, list[NearestToken]]]:
    own = [token.nearest[0] for token in prompt.tokens if token.nearest]
    yield shorten(name, NAME_WIDTH, 4), prompt.loss, prompt, own
    controls = prompt.controls
    other = controls.other_task.prompt if controls.other_task else None
    for label, control in (
        ("random prompt, equal norms", controls.random),
        ("initial prompt", controls.initial),
        (f"other task: {shorten(other or '', NAME_WIDTH, 4)}", controls.other_task),
    ):
        if control is not None:
            yield label, control.loss, control, control.nearest


def _joined(nearest: Sequence[NearestToken]) -> str:
    shown = " ".join(_quoted(near.token) for near in nearest[:MOST_TOKENS])
    return shown + (" …" if len(nearest) > MOST_TOKENS else "")


def _text(elicited: Elicited) -> str:
    if elicited.elicited is None:
        return NONE
    where = "" if elicited.layers is None else " (layers {} to {})".format(*elicited.layers)
    return f"“{' '.join(elicited.elicited.split())}”{where}"


def checkpoint_table(prompt: PromptInspection) -> tuple[list[str], list[list[str]]]:
    """Return columns and cells of the prompt at its checkpoints."""
    columns = ["step", "elicited", "loss", "class rate", "mean of all"]
    rows = []
    for saved in prompt.checkpoints:
        text = NONE if saved.elicited is None else " ".join(saved.elicited.split())
        rates = [_number(saved.class_rate), _number(saved.mean_class_rate)]
        loss = _number(saved.loss, 4)
        rows.append([str(saved.step), shorten(text, TEXT_WIDTH, 0), loss, *rates])
    if prompt.kind == "prefix":
        return [columns[0], columns[2]], [[row[0], row[2]] for row in rows]
    return columns, rows


def pruned_text(name: str, pruned: PrunedPrompt) -> str:
    """Describe the result of ``--prune`` in sentences."""
    if not pruned.dropped:
        return (
            f"{name}: nothing pruned: on {pruned.chosen_on} rows, the loss rises when any one of "
            "its virtual tokens is left out"
        )
    low, high = pruned.difference_low, pruned.difference_high
    scores = ""
    if pruned.score is not None and pruned.score_before is not None:
        scores = f", {pruned.metric} {pruned.score_before:.1%} -> {pruned.score:.1%}"
    return (
        f"{name}: pruned to {pruned.num_virtual_tokens} virtual tokens, without "
        f"{', '.join(map(str, pruned.dropped))}, chosen on {pruned.chosen_on} rows. On the other "
        f"{pruned.rows} rows: loss {pruned.loss_before:.4f} -> {pruned.loss:.4f}, difference "
        f"{pruned.difference:+z.4f} ({low:+z.4f} to {high:+z.4f}){scores}. {pruned.advice} "
        f"Adapter: {pruned.adapter}"
    )


def _show_similarity(similarity: Similarity, console: Console) -> None:
    names = similarity.prompts
    if len(names) < 2:
        return
    console.print()
    title = "similarity of prompts: cosine of their mean virtual tokens"
    if len(names) <= MOST_PROMPTS:
        labels = [shorten(name, NAME_WIDTH, 4) for name in names]
        rows = [
            [f"{i + 1} {label}", *(f"{value:.2f}" for value in values)]
            for i, (label, values) in enumerate(zip(labels, similarity.cosine, strict=True))
        ]
        console.table(title, ["", *(str(i + 1) for i in range(len(names)))], rows, wrap=False)
        return
    pairs = sorted(
        (
            (similarity.cosine[i][j], names[i], names[j])
            for j in range(len(names))
            for i in range(j)
        ),
        key=lambda pair: -pair[0],
    )
    shown = [
        [f"{shorten(a, NAME_WIDTH, 4)}, {shorten(b, NAME_WIDTH, 4)}", f"{value:.2f}"]
        for value, a, b in pairs[:PAIRS]
    ]
    console.table(f"{title}, most similar pairs", ["prompts", "cosine"], shown, wrap=False)
    console.print("all pairs: see inspection.json")


def _number(value: float | None, digits: int = 2) -> str:
    return NONE if value is None else f"{value:.{digits}f}"


def _signed(value: float | None, places: int) -> str:
    return NONE if value is None else f"{value:+z.{places}f}"
