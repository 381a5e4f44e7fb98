"""Print rows as the base will read them: ``promptshard validate --preview``."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import rich.console
import rich.text

from trainer.config import RunConfig
from trainer.runtime import atomic_io
from trainer.runtime.redact import printable

if TYPE_CHECKING:
    from trainer.data.preview import PreviewText
    from trainer.model.base_tokenizer import BaseTokenizer

#: A longer text is shortened in the middle to fewer tokens, on the terminal.
MAX_TOKENS, SHOWN_TOKENS = 200, 160
#: Tokens that are always shown before and after the virtual tokens.
NEAR_TOKENS = 10
#: Marks of learned tokens and of the virtual tokens, which are legible without colors.
LEARNED, VIRTUAL = (">>", "<<"), "[virtual tokens]"
LEGEND = f"tokens are divided by |; {LEARNED[0]}learned{LEARNED[1]}; \\n is a line break"


def print_rows(config: RunConfig, base: BaseTokenizer, count: int, json_file: str | None) -> None:
    """Print the first rows of each task, or write them to a file; ``-``: to stdout as JSON."""
    from trainer.data.preview import preview
    from trainer.data.tokenization.chat_template import read_chat_date

    rows = preview(
        config,
        base.tokenizer,
        base.context_length,
        base.config.vocab_size,
        count,
        date=read_chat_date(Path(config.output_dir)),
        end_ids=base.end_ids,
    )
    record = {"rows": [text.to_json() for text in rows.texts]}
    if json_file == "-":
        json.dump(record, sys.stdout)
        print()
    else:
        show(rows.texts, base.tokenizer, sys.stdout)
    if json_file not in (None, "-"):
        atomic_io.write_json(Path(str(json_file)), record)
    for note in rows.notes:
        print(f"warning: {printable(note)}", file=sys.stderr)


def show(texts: Sequence[PreviewText], tokenizer: Any, out: TextIO) -> None:
    """Print texts, with colors on a terminal."""
    console = rich.console.Console(file=out, highlight=False, soft_wrap=not out.isatty())
    console.print(rich.text.Text(LEGEND, style="dim"))
    of_row = Counter((text.task, text.row, text.position) for text in texts)
    shown = Counter[tuple[str, int, str]]()
    for text in texts:
        example, row = text.example, (text.task, text.row, text.position)
        shown[row] += 1
        part = f", text {shown[row]} of {of_row[row]}" if of_row[row] > 1 else ""
        part += f", position {text.position}" if text.position != "front" else ""
        held_out = part + (", held out" if text.split != "train" else "")
        console.print()
        console.print(
            rich.text.Text(
                printable(f"task {text.task}, {text.where}{held_out}: ")
                + f"{example.num_tokens:,} tokens, {example.num_labels:,} learned",
                style="bold",
            )
        )
        console.print(rich.text.Text.assemble(*_pieces(text, tokenizer)))


def _pieces(text: PreviewText, tokenizer: Any) -> Iterator[tuple[str, str]]:
    """Yield pieces of a text with their styles."""
    ids, labels = text.example.input_ids, text.labels
    gaps = {gap.start: gap for gap in _gaps(len(ids), text.example.prompt_at)}
    before, resumed = False, 0
    for place, token in enumerate(ids):
        learned = labels[place] >= 0
        if place in gaps:
            yield (LEARNED[1], "green") if before else ("", "")
            count = sum(labels[i] >= 0 for i in gaps[place])
            yield f" ... {len(gaps[place]):,} tokens, {count:,} learned ... ", "dim"
            before, resumed = False, gaps[place].stop
        if place < resumed:
            continue
        if before and not learned:
            yield LEARNED[1], "green"
        if place == text.example.prompt_at:
            yield VIRTUAL, "bold cyan"
        elif place and before == learned and place != resumed:
            yield "|", "dim"
        if learned and not before:
            yield LEARNED[0], "green"
        yield token_text(tokenizer, token), "bold green" if learned else ""
        before = learned
    if before:
        yield LEARNED[1], "green"


def _gaps(length: int, prompt_at: int) -> list[range]:
    """Return the tokens of a long text that are not shown, which are not near the prompt."""
    if length <= MAX_TOKENS:
        return []
    start, stop = SHOWN_TOKENS // 2, length - SHOWN_TOKENS // 2
    near = range(prompt_at - NEAR_TOKENS, prompt_at + NEAR_TOKENS)
    gaps = [range(start, min(stop, near.start)), range(max(start, near.stop), stop)]
    return list(filter(None, gaps)) if start < prompt_at < stop else [range(start, stop)]


def token_text(tokenizer: Any, token: int) -> str:
    """Return the text of one token, on one line, without control characters."""
    name = str(tokenizer.convert_ids_to_tokens(token))
    text = name.replace("▁", " ") if "▁" in name else str(tokenizer.decode([token]))
    if not text or "\ufffd" in text:  # a part of a character
        text = name
    return printable(text.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t"))
