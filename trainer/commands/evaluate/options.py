"""Options of ``promptshard evaluate``. Imports no torch."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from trainer.evaluation.pass_at_k import Samples, k_of

#: ``--select-on``: rows on which the best prompt is chosen.
SELECT_ON = ("all", "half")
#: ``--retriever``: BM25 over words, or cosine similarity of mean hidden states.
RETRIEVERS = ("bm25", "cosine")


@dataclass(frozen=True)
class Options:
    """What to evaluate, and on which rows.

    Attributes:
        tasks, prompts: names; empty: all.
        data: file of rows in place of the task's validation rows.
        rows: maximum number of rows of a task, those with the smallest content hash.
        metric: one of ``METRICS``, with a number for k; None: the task's own.
        n_samples, temperature: of the answers that pass@k is estimated from; None: the default.
        adapters: folders of PEFT adapters.
        force: evaluate adapters of another base.
        shots, retrieved: number of examples in context; None: no such arm.
        retriever: what makes train rows similar: words, or the base's hidden states.
        knn: neighbors of kNN prompting; None: no such arm.
        select_on: choose the best prompt on all rows, or on one half and report on the other.
        robustness: also score shifted validation rows and changed rows.
        json: output file; None: ``evaluation.json`` of the run.
        fresh: score all rows again.
    """

    run_dir: Path
    tasks: tuple[str, ...] = ()
    prompts: tuple[str, ...] = ()
    data: str | None = None
    rows: int | None = None
    metric: str | None = None
    n_samples: int | None = None
    temperature: float | None = None
    adapters: tuple[str, ...] = ()
    force: bool = False
    shots: int | None = None
    retrieved: int | None = None
    retriever: Literal["bm25", "cosine"] = "bm25"
    knn: int | None = None
    select_on: Literal["all", "half"] = "all"
    robustness: bool = False
    json: str | None = None
    fresh: bool = False

    @property
    def samples(self) -> Samples | None:
        """How answers are sampled for pass@k; None for another metric."""
        if self.metric is None or k_of(self.metric) is None:
            return None
        default = Samples()
        return Samples(
            default.count if self.n_samples is None else self.n_samples,
            default.temperature if self.temperature is None else self.temperature,
        )

    @property
    def compares_states(self) -> bool:
        """Whether the base retrieves examples."""
        return self.retrieved is not None and self.retriever == "cosine"

    def arguments(self) -> list[str]:
        """Return the command line that ``parse`` reads."""
        lists = {"tasks": "--task", "prompts": "--prompt", "adapters": "--adapter"}
        words = [str(self.run_dir)]
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if field.name in lists:
                words += [f"{lists[field.name]}={item}" for item in value]
            elif value is True:
                words.append(_flag(field.name))
            elif value not in (None, False):
                words.append(f"{_flag(field.name)}={value}")
        return words


def parse(arguments: Sequence[str] | None) -> Options:
    """Parse the arguments of a rank."""
    parser = argparse.ArgumentParser(prog="deepspeed --module trainer.commands.evaluate")
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path)
    repeated: dict[str, Any] = {"action": "append", "default": []}
    parser.add_argument("--task", dest="tasks", metavar="NAME", **repeated)
    parser.add_argument("--prompt", dest="prompts", metavar="NAME", **repeated)
    parser.add_argument("--adapter", dest="adapters", metavar="DIR", **repeated)
    parser.add_argument("--data", metavar="FILE", help="rows in place of the validation rows")
    parser.add_argument("--rows", type=int, metavar="N", help="maximum rows of a task")
    parser.add_argument("--metric", metavar="NAME")
    parser.add_argument("--n-samples", type=int, metavar="N", help="answers per row for pass@k")
    parser.add_argument("--temperature", type=float, metavar="T", help="of these answers")
    parser.add_argument("--shots", type=int, metavar="K", help="fixed examples in context")
    parser.add_argument("--retrieved", type=int, metavar="K", help="retrieved examples")
    parser.add_argument("--retriever", choices=RETRIEVERS, default="bm25")
    parser.add_argument("--knn", type=int, metavar="K", help="neighbors of kNN prompting")
    parser.add_argument("--select-on", choices=SELECT_ON, default="all")
    parser.add_argument("--json", metavar="FILE")
    for name in ("--force", "--robustness", "--fresh"):
        parser.add_argument(name, action="store_true")
    parser.add_argument("--local_rank", type=int, help="given by the launcher; not used")
    values: dict[str, Any] = vars(parser.parse_args(arguments))
    del values["local_rank"]
    lists: Any = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return Options(**lists)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
