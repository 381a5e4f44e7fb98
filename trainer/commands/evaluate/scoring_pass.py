"""One pass over all rows of all arms that have no record yet."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version

from torch import Tensor

from trainer.commands.evaluate.arm import Arm
from trainer.commands.evaluate.scoring import ArmScorer
from trainer.commands.evaluate.store import PredictionStore
from trainer.config import RunConfig
from trainer.distributed.deepspeed_engine import Engine, device_name
from trainer.distributed.model_loading import load_base
from trainer.evaluation.baseline_cache import RULES
from trainer.evaluation.evaluator import Evaluator
from trainer.model.checkpoint_files import BaseFiles
from trainer.prompts.adapter_files import WeightAdapter
from trainer.prompts.soft_prompt import SoftPrompt
from trainer.runtime import stop_signals
from trainer.runtime.console import Console


@dataclass(frozen=True)
class Loaded:
    """Prompts and adapters in memory, with the digests of their files."""

    prompts: Sequence[SoftPrompt] = ()
    prompt_digests: Sequence[str] = ()
    adapters: Sequence[tuple[WeightAdapter, Mapping[str, Tensor]]] = ()
    adapter_digests: Sequence[str] = ()


@dataclass
class BaseOnDemand:
    """The base, which is loaded where it is used first; all ranks use it together."""

    engine: Engine
    files: BaseFiles
    config: RunConfig
    console: Console

    @property
    def digest(self) -> str:
        """Describes the base and how it computes."""
        versions = [version(name) for name in ("torch", "transformers")]
        settings = self.config.base.model_dump(mode="json")
        device = device_name(self.engine.device)
        return json.dumps([RULES, versions, device, self.files.fingerprint, settings])

    @cached_property
    def evaluator(self) -> Evaluator:
        """Load the base; a stop signal then ends the evaluation between two packed batches."""
        base = load_base(*(self.engine, self.files, self.config, self.console), only_inference=True)
        stop_signals.defer()
        return Evaluator(self.engine, base.model, self.files.tokenizer, base.budget)


def score_missing(
    base: BaseOnDemand,
    arms: Mapping[str, Sequence[Arm]],
    loaded: Loaded,
    store: PredictionStore | None,
    *,
    fresh: bool = False,
) -> None:
    """Score the rows without a record; the base is loaded only if there are any; a collective.

    Args:
        arms: of every task.
        store: on rank 0.
        fresh: score all rows again.

    Raises:
        Stopped: on all ranks; the records of complete blocks are kept.
    """
    console = base.console

    def open_store() -> dict[str, dict[str, int]]:
        assert store is not None
        digests = base.digest, loaded.prompt_digests, loaded.adapter_digests
        return {
            task: {
                arm.name: store.open(
                    task, arm.name, arm.digest(*digests), fresh=fresh, about=arm.about()
                )
                for arm in of_task
            }
            for task, of_task in arms.items()
        }

    done = base.engine.run_on_main(open_store)
    missing = sum(
        len(arm.numbers) - done[task][arm.name] for task, own in arms.items() for arm in own
    )
    if kept := sum(sum(of_task.values()) for of_task in done.values()):
        console.print(f"{kept:,} rows were scored before; {missing:,} remain")
    if not missing:
        return
    scorer = ArmScorer(base.evaluator, loaded.prompts, loaded.adapters, store)
    texts = sum(scorer.num_texts(own, done[task]) for task, own in arms.items())
    with console.phase("evaluating", texts, "texts") as phase:
        for task, own in arms.items():
            scorer.score(own, done[task], phase.advance)
