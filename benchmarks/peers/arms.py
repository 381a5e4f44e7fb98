"""One rank of one arm: load the base model, then train in turns with the other arms.

A turn is one training step. The first is a warm-up, the next ones are timed, and the last ones
count FLOPs and saved bytes (``costs``) and measure shares of time, which slows a step down. All
rows are read in ``EPOCH`` steps. Batches grouped by length differ in length between the steps of an
epoch, so timings and counts cover whole epochs. Shares are measured in a step that follows another
of the same arm, whose memory is still mapped, as in a run.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.peers.counters import FlopCounter, PeakSavedBytes, step_shares
from benchmarks.peers.rows import Row, initial_prompt, make_rows
from benchmarks.peers.turns import Turns

#: Steps in which all rows are read once.
EPOCH = 2
WARM_UP, COUNTED = 1, ("costs",) * EPOCH + ("before shares", "shares")


@dataclass(frozen=True)
class Case:
    """Settings of all arms of one comparison.

    Attributes:
        batch: rows of a rank's micro-batch in peers; this trainer fills packed batches.
        single: this trainer reads one row per packed batch.
    """

    base: str
    num_virtual_tokens: int
    ranks: int
    batch: int
    accumulation: int
    timed: int
    equal: bool = False
    single: bool = False
    learning_rate: float = 3.0e-3

    @property
    def rows_per_step(self) -> int:
        return self.ranks * self.batch * self.accumulation

    @property
    def steps(self) -> int:
        return WARM_UP + self.timed + len(COUNTED)

    @property
    def shape(self) -> dict[str, Any]:
        shape: dict[str, Any] = json.loads((Path(self.base) / "config.json").read_text())
        return shape

    def rows(self) -> list[Row]:
        """Rows of an epoch, which every arm reads repeatedly."""
        count = EPOCH * self.rows_per_step
        return make_rows(count, self.shape["vocab_size"], equal=self.equal)

    def prompt(self) -> torch.Tensor:
        return initial_prompt(self.num_virtual_tokens, self.shape["hidden_size"])

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> Case:
        return cls(**json.loads(path.read_text()))


class Meter:
    """Measures turns from inside a training loop."""

    def __init__(self, case: Case, turns: Turns, parameters: Callable[[], Any]) -> None:
        self._case, self._turns, self._parameters = case, turns, parameters
        self._open: Any = None
        self.tokens = 0
        self.losses: list[float] = []

    def before_step(self, step: int) -> None:
        self._turns.wait(step)
        self._open = self._measured(step)
        self._open.__enter__()

    def after_step(self) -> None:
        self._open.__exit__(None, None, None)

    @contextmanager
    def _measured(self, turn: int) -> Iterator[None]:
        self.tokens = 0
        number = turn - WARM_UP - self._case.timed
        kind = COUNTED[number] if number >= 0 else None
        result: dict[str, Any] = {}
        with self._counter(kind, result):
            started = time.perf_counter()
            yield
            result["seconds"] = time.perf_counter() - started
        result["tokens"] = self.tokens
        self._turns.done(turn, result, free_memory=kind != "before shares")

    @contextmanager
    def _counter(self, kind: str | None, result: dict[str, Any]) -> Iterator[None]:
        if kind == "costs":
            torch.compiler.set_stance("force_eager")  # fused operators would not be counted
            with FlopCounter() as flops, PeakSavedBytes(self._parameters).counting() as saved:
                yield
            torch.compiler.set_stance("default")
            result |= {"flops": flops.total, "saved": saved.peak}
        elif kind == "shares":
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as prof:
                yield
            result["shares"] = step_shares(prof.events())
        else:
            yield


# --- ours ---


def ours(
    case: Case,
    meter_of: Callable[[Callable[[], Any]], Meter],
    *,
    as_peers: bool = False,
    **base: Any,
) -> list[float]:
    """Train with this trainer at its defaults, except for ``base`` settings.

    Args:
        as_peers: micro-batches of as many rows as the peers', which must be of equal length.
    """
    from trainer.config import RunConfig
    from trainer.data.token_table import Example
    from trainer.distributed.deepspeed_engine import Engine
    from trainer.distributed.model_loading import load_base
    from trainer.model.checkpoint_files import open_base
    from trainer.packing.packed_row import PackedRow
    from trainer.prompts.soft_prompt import VirtualTokens
    from trainer.runtime.console import Console
    from trainer.training.prompt_optimizer import make_optimizer
    from trainer.training.step import step_gradients

    prompt_settings = {
        "name": "p",
        "task": "t",
        "num_virtual_tokens": case.num_virtual_tokens,
        "learning_rate": case.learning_rate,
        "warmup_ratio": 0.0,
        # As in the peers, so that losses can be compared.
        "optimizer": "adamw",
        "schedule": "cosine",
        "betas": [0.9, 0.999],
    }
    config = RunConfig.model_validate(
        {
            "output_dir": "-",
            "base": {"model": case.base, **base},
            "tasks": [{"name": "t", "train": "-", "input": "{a}", "target": "{b}"}],
            "prompts": [prompt_settings],
            "training": {"steps": case.steps},
        }
    )
    engine = Engine(1800)
    drawn = case.rows()
    lengths = [len(row.input_ids) for row in drawn]
    with open(os.devnull, "w") as nothing:
        console = Console(nothing, nothing)
        loaded = load_base(engine, open_base(config.base), config, console, lengths=lengths)
    prompt = torch.nn.Parameter(case.prompt())
    optimizer = make_optimizer(config.prompts[0], {"p": prompt}, case.steps)
    meter = meter_of(loaded.model.parameters)
    rows = itertools.cycle(
        Example.with_target(tuple(r.input_ids), r.labels.count(-100), i)
        for i, r in enumerate(drawn)
    )
    budget = 1 if case.single else loaded.budget.tokens
    if as_peers:
        budget = case.num_virtual_tokens + case.batch * max(lengths)
    for step in range(case.steps):
        meter.before_step(step)
        packed_rows = [PackedRow(next(rows), 0, i) for i in range(case.rows_per_step)]
        result = step_gradients(engine, loaded.model, packed_rows, [VirtualTokens(prompt)], budget)
        prompt.grad = result.gradients[0]
        optimizer.step()
        # The result counts tokens of all ranks, but each rank reports its share, as in the peers.
        meter.tokens += result.useful_tokens / engine.world_size
        meter.losses += result.losses
        meter.after_step()
    return meter.losses


# --- peers ---


def trainer_peer(
    case: Case,
    meter_of: Callable[[Callable[[], Any]], Meter],
    *,
    library: str = "transformers",
    sampling: str = "random",
    zero3: bool = False,
) -> list[float]:
    """PEFT prompt tuning through ``transformers.Trainer`` or TRL's ``SFTTrainer``."""
    import datasets
    from peft import PromptTuningConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from transformers.utils import logging

    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    trainer_class, settings_class, more = _library(library)
    settings = settings_class(
        output_dir=str(Path(case.base).parent / f"out-{os.getpid()}"),
        per_device_train_batch_size=case.batch,
        gradient_accumulation_steps=case.accumulation,
        max_steps=case.steps,
        learning_rate=case.learning_rate,
        lr_scheduler_type="cosine",
        train_sampling_strategy=sampling,
        use_cpu=True,
        bf16=False,  # four times slower than fp32 on CPUs without it
        gradient_checkpointing=False,
        deepspeed=_zero3_policy() if zero3 else None,
        ddp_backend="gloo",
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        **more,
    )
    base = AutoModelForCausalLM.from_pretrained(case.base, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(case.base)
    model = get_peft_model(
        base,
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=case.num_virtual_tokens),
    )
    _start_from(model, case.prompt(), zero3)
    meter = meter_of(model.parameters)

    class Measured(trainer_class):  # type: ignore[misc, valid-type]
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            meter.tokens += int(inputs["attention_mask"].sum())
            return super().training_step(model, inputs, *args, **kwargs)

    class Steps(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            meter.before_step(state.global_step)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            meter.after_step()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in logs:
                meter.losses.append(logs["loss"])

    rows = [{"input_ids": row.input_ids, "labels": row.labels} for row in case.rows()]
    Measured(
        model=model,
        args=settings,
        train_dataset=datasets.Dataset.from_list(rows),
        data_collator=_collate,
        processing_class=tokenizer,
        callbacks=[Steps()],
    ).train()
    return meter.losses


def _library(name: str) -> tuple[Any, Any, dict[str, Any]]:
    if name == "transformers":
        from transformers import Trainer, TrainingArguments

        return Trainer, TrainingArguments, {}
    from trl import SFTConfig, SFTTrainer

    return SFTTrainer, SFTConfig, {"dataset_kwargs": {"skip_prepare_dataset": True}}


def _collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    length = max(len(row["input_ids"]) for row in rows)

    def padded(key: str, fill: int) -> torch.Tensor:
        return torch.tensor([r[key] + [fill] * (length - len(r[key])) for r in rows])

    lengths = torch.tensor([[len(row["input_ids"])] for row in rows])
    return {
        "input_ids": padded("input_ids", 0),
        "labels": padded("labels", -100),
        "attention_mask": (torch.arange(length)[None] < lengths).long(),
    }


def _start_from(model: Any, prompt: torch.Tensor, zero3: bool) -> None:
    weight = model.prompt_encoder["default"].embedding.weight
    if not zero3:
        weight.data.copy_(prompt)
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
        if dist.get_rank() == 0:
            weight.data.copy_(prompt)


def _zero3_policy() -> dict[str, Any]:
    """Return DeepSpeed's fastest settings here: layers stay gathered from forward to backward."""
    return {
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": True,
            "contiguous_gradients": True,
            "stage3_param_persistence_threshold": 100_000,
            "stage3_prefetch_bucket_size": 50_000_000,
            "stage3_max_live_parameters": 1_000_000_000,
            "stage3_max_reuse_distance": 1_000_000_000,
        },
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
    }


#: The arm of this trainer whose micro-batches have as many rows as the peers'.
AS_PEERS = "ours, the peers' micro-batches"
GROUPED = {"sampling": "group_by_length"}
ARMS: dict[str, Callable[..., list[float]]] = {
    "ours": ours,
    AS_PEERS: lambda *a: ours(*a, as_peers=True),
    "ours, exact": lambda *a: ours(*a, matmul="dequantize"),
    "ours, fp32": lambda *a: ours(*a, quantization="none"),
    "PEFT + Trainer": trainer_peer,
    "PEFT + Trainer, grouped": lambda *a: trainer_peer(*a, **GROUPED),
    "PEFT + Trainer, in order": lambda *a: trainer_peer(*a, sampling="sequential"),
    "PEFT + ZeRO-3": lambda *a: trainer_peer(*a, zero3=True),
    "PEFT + ZeRO-3, grouped": lambda *a: trainer_peer(*a, zero3=True, **GROUPED),
    "TRL + PEFT": lambda *a: trainer_peer(*a, library="trl"),
    "TRL + PEFT, grouped": lambda *a: trainer_peer(*a, library="trl", **GROUPED),
}


def main(arm: str, case_file: str, folder: str) -> None:
    """Run one rank of an arm; losses go to ``FOLDER/losses.json``."""
    rank = int(os.environ["RANK"])
    case = Case.read(Path(case_file))
    turns = Turns(Path(folder), rank)
    losses = ARMS[arm](case, lambda parameters: Meter(case, turns, parameters))
    if rank == 0:
        (Path(folder) / "losses.json").write_text(json.dumps(losses))


if __name__ == "__main__":
    main(*sys.argv[1:])
