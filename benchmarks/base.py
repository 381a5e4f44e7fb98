"""Memory and traffic of a frozen int8 base: this trainer and PEFT + bitsandbytes + ZeRO-3.

    python -m benchmarks.base

Makes a Llama of 110M random weights in bf16, loads it with both on 2 CPU ranks, trains a soft
prompt for one step of several micro-batches, and writes a table and JSON to benchmarks/results/.
Bytes are counted, not estimated, and do not depend on the machine. Needs the ``test`` extra (peft)
and accelerate.

The model's head is tied to its embeddings. A second model has the same layers and an untied head
(134M weights).
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import is_fake

from benchmarks.figures import figure, figure_rows, machine
from benchmarks.llama import LLAMA_110M, make_base

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
RANKS = 2
#: Bytes gathered per step relative to the model's bytes in bf16, with DeepSpeed's default ZeRO-3
#: and no gradient accumulation: each layer once in forward, nearly all again in backward.
DEFAULT_ZERO3 = 1.77
MICRO_BATCHES, ROWS, LENGTH, VIRTUAL = 4, 1, 24, 8
SHAPE = LLAMA_110M | {"max_position_embeddings": 512, "dtype": "bfloat16"}


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "llama-110m"
        _python("-m", "benchmarks.base", "make", str(folder))
        prepared = Path(temporary) / "llama-110m-int8"
        _python("-m", "launch", "prepare", str(folder), str(prepared))
        untied = Path(temporary) / "llama-134m-untied"
        _python("-m", "benchmarks.base", "make", str(untied), "untied")
        arms = {
            "ours": _ranks(folder, "ours", "keep"),
            "ours, 8-bit folder": _ranks(prepared, "ours", "keep"),
            "ours, embeddings int8": _ranks(folder, "ours", "int8"),
            "ours, untied head": _ranks(untied, "ours", "keep"),
            "peer": _ranks(folder, "peer"),
        }
        file_bytes = (folder / "model.safetensors").stat().st_size
    report = {
        "ranks": RANKS,
        "micro_batches": MICRO_BATCHES,
        "shape": SHAPE,
        "machine": machine(),
        "file_bytes": file_bytes,
        "arms": arms,
        "figures": figures(arms, file_bytes),
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "base.json").write_text(json.dumps(report, indent=2) + "\n")
    text = table(report)
    (RESULTS / "base.md").write_text(text)
    print(text)


def figures(arms: dict[str, Any], file_bytes: int) -> list[dict[str, Any]]:
    """Return each figure, of the worst rank, with its target."""
    ours, lean, peer = arms["ours"], arms["ours, embeddings int8"], arms["peer"]
    untied = arms["ours, untied head"]
    gathered = DEFAULT_ZERO3 * 2 * ours["parameters"]
    gathered_untied = DEFAULT_ZERO3 * 2 * untied["parameters"]
    return [
        figure("int8 bytes at rest per rank / peer's", ours["int8"] / peer["int8"], 0.4),
        figure("all base bytes at rest per rank / peer's", ours["base"] / peer["base"], None),
        figure("gathered per step / 1.77 x bf16 model", ours["gathered"] / gathered, 0.32),
        figure("the same, head untied from embeddings", untied["gathered"] / gathered_untied, 0.32),
        figure("the same, embeddings int8", lean["gathered"] / gathered, 0.32),
        figure("gathered per step / peer's", ours["gathered"] / peer["gathered"], None),
        figure("peak RSS while loading / (shard + 2 x largest)", ours["peak"] / ours["allowed"], 1),
        figure("bytes read per rank / file", ours["read"] / file_bytes, 0.55),
    ]


def table(report: dict[str, Any]) -> str:
    """Render the figures and the measurements as Markdown."""
    lines = [
        "# The frozen base: 110M-parameter Llama, 2 CPU ranks",
        "",
        f"`python -m benchmarks.base` on {report['machine']}. One step of "
        f"{report['micro_batches']} micro-batches per rank. Peer: transformers `load_in_8bit` + "
        "PEFT prompt tuning + DeepSpeed ZeRO-3 through Trainer.",
        "",
        *figure_rows(report["figures"]),
    ]
    titles = {
        "int8": "int8 at rest",
        "base": "base at rest",
        "gathered": "gathered per step",
        "exchanged": "of it words and head",
        "peak": "peak RSS while loading",
        "read": "read",
    }
    lines += [
        "",
        f"| MB per rank | {' | '.join(titles.values())} |",
        "|---" * (len(titles) + 1) + "|",
    ]
    for name, arm in report["arms"].items():
        values = ("-" if arm[key] is None else f"{arm[key] / 1e6:.2f}" for key in titles)
        lines.append(f"| {name} | {' | '.join(values)} |")
    lines += [
        "",
        "Gathered: whole size of every gathered buffer, a rank's own part included, as in the "
        "1.77. With it goes what ranks exchange about word embeddings, which are looked up by the "
        "row, and about the head, of which each holds a block: hidden states of label positions "
        "travel, not the table, as long as labels are few. The model with an untied head has the "
        "same layers and "
        f"{report['arms']['ours, untied head']['parameters'] / 1e6:.0f}M weights. At rest: after "
        "the step. RSS: above what imports and process groups take. The peer reads the whole file "
        "on every rank, through a memory map, which is not counted.",
        "",
    ]
    return "\n".join(lines)


# --- one rank ---


def ours(folder: str, ends: str) -> dict[str, Any]:
    from trainer.config import RunConfig
    from trainer.data.token_table import Example
    from trainer.distributed.deepspeed_engine import Engine
    from trainer.distributed.model_loading import load_base
    from trainer.distributed.zero3_sharder import base_bytes
    from trainer.model.checkpoint_files import open_base
    from trainer.packing.packed_row import PackedRow
    from trainer.prompts.soft_prompt import VirtualTokens
    from trainer.runtime.console import Console
    from trainer.training.step import step_gradients

    config = RunConfig.model_validate(
        {
            "output_dir": "-",
            "base": {"model": folder, "embeddings": ends, "head": ends},
            "tasks": [{"name": "t", "train": "-", "input": "{a}", "target": "{b}"}],
            "prompts": [{"name": "p", "task": "t", "num_virtual_tokens": VIRTUAL}],
            "training": {"steps": 1},
        }
    )
    engine = Engine(600)
    gathered, exchanged = _count_gathers(), _count_exchanged()
    files = open_base(config.base)
    with open(os.devnull, "w") as nothing:
        before = _start_peak()
        loaded = load_base(engine, files, config, Console(nothing, nothing))
        peak = _resident("VmHWM") - before
    rows = engine.world_size * MICRO_BATCHES * ROWS
    ids = torch.randint(3, 300, (rows, LENGTH), generator=torch.Generator().manual_seed(0))
    packed_rows = [
        PackedRow(Example.with_target(tuple(row), LENGTH // 2, i), 0, i)
        for i, row in enumerate(ids.tolist())
    ]
    prompt = VirtualTokens(torch.randn(VIRTUAL, loaded.model.hidden_size) * 0.02)
    for _ in range(2):  # the second step is typical of all later ones
        start, before_step = gathered[0], exchanged[0]
        step_gradients(engine, loaded.model, packed_rows, [prompt], VIRTUAL + ROWS * LENGTH)
    words = loaded.model.model.get_input_embeddings()
    head = loaded.model.model.get_output_embeddings()
    tables = [head.table_bytes] * (1 if words.tied else 2)
    sizes = [p.ds_numel * p.ds_tensor.element_size() for p in loaded.model.parameters()] + tables
    exchanged_bytes = exchanged[0] - before_step
    stored = base_bytes(loaded.model)
    result = {
        "parameters": sum(p.ds_numel for p in loaded.model.parameters())
        + len(tables) * words.num_embeddings * words.embedding_dim,
        "int8": _live_int8(),
        "base": stored,
        "gathered": gathered[0] - start + exchanged_bytes,
        "exchanged": exchanged_bytes,
        "peak": peak,
        "allowed": stored + 2 * max(sizes),
        "read": loaded.stats.bytes_read,
    }
    return _worst(result)


def peer(folder: str) -> dict[str, Any]:
    from peft import PromptTuningConfig, get_peft_model
    from transformers import (
        AutoModelForCausalLM,
        BitsAndBytesConfig,
        Trainer,
        TrainingArguments,
    )

    policy = {
        "zero_optimization": {"stage": 3},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "bf16": {"enabled": "auto"},
    }
    with tempfile.TemporaryDirectory() as output:
        settings = TrainingArguments(
            output_dir=output,
            per_device_train_batch_size=ROWS,
            gradient_accumulation_steps=MICRO_BATCHES,
            max_steps=2,
            use_cpu=True,
            bf16=True,
            deepspeed=policy,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
        )
        gathered = _count_gathers()
        before = _start_peak()
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            quantization_config=BitsAndBytesConfig(load_in_8bit=True),
            dtype=torch.bfloat16,
        )
        peak = _resident("VmHWM") - before
        prompted = get_peft_model(
            model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL)
        )
        ids = torch.randint(3, 300, (256, LENGTH), generator=torch.Generator().manual_seed(0))
        rows = [{"input_ids": row, "labels": row} for row in ids]
        trainer = Trainer(model=prompted, args=settings, train_dataset=rows)
        trainer.train()
        result = {
            "int8": _live_int8(),
            "base": _live_base(prompted),
            "gathered": gathered[0] // 2,  # of two steps
            "exchanged": None,
            "peak": peak,
            "read": None,
        }
        return _worst(result)


def _count_gathers() -> list[int]:
    """Start to count the bytes of all buffers that ZeRO-3 gathers, in a list of one item."""
    from deepspeed.runtime.zero import partition_parameters

    gather, total = partition_parameters._dist_allgather_fn, [0]

    def counted(own: torch.Tensor, full: torch.Tensor, group: Any = None) -> Any:
        total[0] += full.nbytes
        return gather(own, full, group)

    partition_parameters._dist_allgather_fn = counted
    return total


def _count_exchanged() -> list[int]:
    """Start to count the bytes that ranks exchange for embeddings and head, in a list of one item.

    Includes a rank's own part, as in gathered buffers; a sum is transferred twice.
    """
    from trainer.distributed.zero3_sharder import ShardGroup

    total = [0]

    def count(name: str, weigh: Any) -> None:
        collective = getattr(ShardGroup, name)

        def counted(self: Any, sent: torch.Tensor, *arguments: Any) -> torch.Tensor:
            received: torch.Tensor = collective(self, sent, *arguments)
            total[0] += weigh(sent, received)
            return received

        setattr(ShardGroup, name, counted)

    count("swap", lambda sent, received: received.nbytes)
    count("gather", lambda sent, received: received.nbytes)
    count("scatter_sum", lambda sent, received: sent.nbytes)
    count("sum", lambda sent, received: 2 * received.nbytes)
    count("maximum", lambda sent, received: 2 * received.nbytes)
    return total


def _live_int8() -> int:
    """Bytes of all live int8 memory; shared memory is counted once."""
    return sum(_storages(t for t in _tensors() if t.dtype == torch.int8).values())


def _live_base(model: torch.nn.Module) -> int:
    """Bytes of all live int8 memory, and of a frozen model's shards and buffers of other types."""
    held = [getattr(p, "ds_tensor", p) for p in model.parameters() if not p.requires_grad]
    held += list(model.buffers())
    held += [t for t in _tensors() if t.dtype == torch.int8]
    return sum(_storages(held).values())


def _tensors() -> list[torch.Tensor]:
    """All live tensors, without the fake tensors of torch.compile."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    return [tensor for tensor in tensors if not is_fake(tensor)]


def _storages(tensors: Any) -> dict[int, int]:
    return {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in tensors
        if t.device.type != "meta" and t.untyped_storage().nbytes()
    }


def _start_peak() -> int:
    """Reset the peak of resident memory; return the bytes that are resident now."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def _resident(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) * 1024


def _worst(result: dict[str, Any]) -> dict[str, Any]:
    import torch.distributed as dist

    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, result)
    return {
        key: None if value is None else max(one[key] for one in every)
        for key, value in result.items()
    }


# --- processes ---


def make(folder: str, head: str = "tied") -> None:
    make_base(Path(folder), SHAPE | {"tie_word_embeddings": head == "tied"})


def _ranks(folder: Path, arm: str, *arguments: str) -> dict[str, Any]:
    from launch.launcher_command import Devices, environment, free_port, local_command

    print(f"{arm} {' '.join(arguments)}: {RANKS} ranks ...", file=sys.stderr, flush=True)
    devices = Devices("cpu", tuple(range(RANKS)))
    out = folder.parent / "result.json"
    words = [arm, str(out), str(folder), *arguments]
    environ = environment(os.environ, devices, os.cpu_count() or 1, words)
    _run(local_command("benchmarks.base", devices, free_port()), environ)
    result: dict[str, Any] = json.loads(out.read_text())
    return result


def _python(*arguments: str) -> None:
    _run([sys.executable, *arguments], dict(os.environ))


def _run(command: list[str], environ: dict[str, str]) -> None:
    done = subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    elif sys.argv[1] == "make":
        make(*sys.argv[2:])
    else:
        measured = {"ours": ours, "peer": peer}[sys.argv[1]](*sys.argv[3:])
        if os.environ.get("RANK", "0") == "0":
            Path(sys.argv[2]).write_text(json.dumps(measured))
