"""``python -m trainer.commands.check_rows RUN.yaml [--rows N]``: tokenize and check all rows.

The part of ``promptshard validate`` that needs a tokenizer. Loads no weights, and imports torch,
which takes longer than the rest, for GGUF files only.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.commands.preview import print_rows
from trainer.config import RunConfig, load
from trainer.runtime.console import Console
from trainer.runtime.errors import EXIT_BAD_INPUT, EXIT_DONE, BadInput
from trainer.runtime.process import flush_and_exit
from trainer.runtime.redact import printable, redact

if TYPE_CHECKING:
    from trainer.data.task_data import TaskData
    from trainer.model.base_tokenizer import BaseTokenizer


def main(arguments: Sequence[str], *, hide_torch: bool = False) -> int:
    parser = argparse.ArgumentParser(prog="python -m trainer.commands.check_rows")
    parser.add_argument("run_file")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--rows", type=int, default=0)
    parser.add_argument("--json")
    chosen = parser.parse_args(arguments)
    try:
        config = load(chosen.run_file, chosen.overrides)
        if hide_torch and not config.base.model.endswith(".gguf"):
            without_torch()
        _check(config, chosen.rows, chosen.json)
    except BadInput as error:
        for problem in error.problems:
            print(f"error: {printable(redact(problem))}", file=sys.stderr)
        return EXIT_BAD_INPUT
    return EXIT_DONE


def tokenize_rows(config: RunConfig, base: BaseTokenizer) -> tuple[RunConfig, dict[str, TaskData]]:
    """Tokenize all rows as ``train`` does; return the settings with resolved positions, and tasks.

    Raises:
        BadInput: rows or templates are not usable.
    """
    from trainer.data.prompt_positions import with_positions
    from trainer.data.task_data import load_tasks
    from trainer.data.tokenization.chat_template import read_chat_date

    console = Console(sys.stderr, sys.stderr)
    date = read_chat_date(Path(config.output_dir))
    config = with_positions(config, base.tokenizer, date)
    tasks = load_tasks(
        config,
        base.tokenizer,
        base.context_length,
        base.config.vocab_size,
        console.working,
        console.reading,
        date=date,
        end_ids=base.end_ids,
    )
    return config, tasks


def _check(config: RunConfig, count: int, json_file: str | None) -> None:
    from trainer.evaluation.stop_criteria import check_all_targets
    from trainer.model.base_tokenizer import is_downloaded, open_tokenizer
    from trainer.model.tokenizer_class import class_warning

    if not count and not is_downloaded(config.base):
        print(
            f"note: {config.base.model} is not downloaded, so rows are checked without its "
            "tokenizer; --preview downloads it",
            file=sys.stderr,
        )
        return
    base = open_tokenizer(config.base)
    config, tasks = tokenize_rows(config, base)
    check_all_targets(tasks, base.tokenizer, base.generation)
    warning = class_warning(base.tokenizer, base.folder)
    notes = [warning] if warning else []
    notes += [note for data in tasks.values() for note in data.warnings]
    for note in dict.fromkeys(notes):
        print(f"warning: {printable(note)}", file=sys.stderr)
    if count:
        print_rows(config, base, count, json_file)


def without_torch() -> None:
    """Make transformers behave as if torch were not installed; tokenizers do not need it."""
    sys.modules["torch"] = None  # type: ignore[assignment]
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # a warning that models are missing


if __name__ == "__main__":
    flush_and_exit(main(sys.argv[1:], hide_torch=True))
