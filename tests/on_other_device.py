"""Program: every family's step and the parts of a run, on a simulated device.

python -m tests.on_other_device OUT.json
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.unsharded_base import load_unsharded
from tests.family_bases import CASES, errors, problem, save_family
from tests.one_rank import OneRank
from tests.other_device import Waits, moved, other_device
from tests.soft_prompts import soft_prompts
from tests.unit.test_other_device import PRODUCTS
from tests.unit.test_prefix_tuning import WITHOUT, pasts
from trainer.config import RunConfig, load
from trainer.data.task_data import load_tasks
from trainer.distributed.prefetch import RankInfo, prepare_batch, prepare_step
from trainer.evaluation.evaluator import Evaluator
from trainer.evaluation.generation import generate, keys_and_values
from trainer.evaluation.knn_prompting import nearest, read_anchors
from trainer.evaluation.read_texts import mean_hidden_states
from trainer.evaluation.scoring import Request
from trainer.evaluation.stop_criteria import StopCriteria
from trainer.evaluation.token_sampling import Sampling
from trainer.inference.requests import GenerationRequest
from trainer.inference.stream import Stream, StreamingDecoder
from trainer.inference.stream_text import Piece
from trainer.model.checkpoint_files import open_base
from trainer.model.layers.matmul_selection import use_matmul
from trainer.model.layers.moe import FrozenExperts
from trainer.model.prompted_model import PromptedBase
from trainer.packing.activation_memory import TokenBudget
from trainer.packing.batch_source import BatchSource
from trainer.packing.packed_row import PackedRow
from trainer.prompts.soft_prompt import PrefixKeyValues, SoftPrompt, VirtualTokens, prompt_lengths
from trainer.runtime.console import Console
from trainer.training.init_scoring import LossInitScorer
from trainer.training.initial_bank import embedding_function, make_bank
from trainer.training.step import batch_gradients, batch_objective, label_counts

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
STEPS, TOKENS, OUTLIERS = 2, 120, 2.0
PROMPTS = [
    {
        **{"name": "words", "task": "triage", "num_virtual_tokens": 4, "init": "search"},
        **{"noise": 0.1, "ema": 0.9},
    },
    {"name": "mlp", "task": "animals", "method": "p_tuning", "num_virtual_tokens": 3},
    {"name": "past", "task": "animals", "method": "prefix_tuning", "num_virtual_tokens": 4},
    {"name": "adafactor", "task": "triage", "num_virtual_tokens": 4, "optimizer": "adafactor"},
    {
        "name": "taught",
        "task": "triage",
        "num_virtual_tokens": 2,
        "objective": "distill",
        "teacher": "What is wrong with this patient?",
    },
]


def main() -> None:
    with torch.compiler.set_stance("force_eager"):
        families = {f"{case}-dequantize": family(case, "dequantize") for case in CASES}
        for case, kind in PRODUCTS:
            families[f"{case}-{kind}"] = family(case, kind, checkpointing=True)
        result = {"families": families, "run": compared_run(), "inference": compared_inference()}
    Path(sys.argv[1]).write_text(json.dumps(result))


def family(case: str, kind: str, *, checkpointing: bool = False) -> dict[str, float]:
    """Distance of a packed batch's loss and gradients from the CPU's, and the number of waits."""
    with tempfile.TemporaryDirectory() as folder:
        base = load_unsharded(save_family(Path(folder), case), "int8", checkpointing)
    use_matmul(base, kind, OUTLIERS)
    rows, prompts = problem(base.hidden_size)
    if case not in WITHOUT and base.packed:
        prompts = [*prompts, *pasts(base)]
    packed_rows = [PackedRow(rows[i % len(rows)].example, i % len(prompts), i) for i in range(8)]
    expected, wanted, _ = batch_step(base, packed_rows, prompts, CPU)
    moe = sum(isinstance(module, FrozenExperts) for module in base.modules())
    with other_device() as device:
        moved(base)
        loss, gradients, waits = batch_step(base, packed_rows, prompts, device)
    error = max(errors(gradients, wanted))
    return {
        "loss": abs(loss / expected - 1),
        "gradient": error,
        "waits": waits,
        "padded": not base.packed,
        "layers_of_experts": moe,
    }


def batch_step(
    base: PromptedBase,
    packed_rows: Sequence[PackedRow],
    prompts: Sequence[Tensor],
    device: torch.device,
) -> tuple[float, list[Tensor], int]:
    """Loss, gradients, and how often host and device waited for each other in between."""
    leaves = [prompt.to(device, copy=True).requires_grad_() for prompt in prompts]
    soft = soft_prompts(leaves)
    lengths = prompt_lengths(soft)
    batch = prepare_batch(packed_rows, lengths, CPU).to(device)
    Waits.count = 0
    objective, _ = batch_objective(base, batch, soft, label_counts(packed_rows, len(leaves)))
    gradients = torch.autograd.grad(objective, leaves)
    waits = Waits.count
    return float(objective), [gradient.cpu() for gradient in gradients], waits


def compared_run() -> dict[str, Any]:
    """Run search, steps, scoring and generation on the CPU and on the device."""
    expected = run(load_unsharded(ROOT / "examples" / "tiny_base", "int8"), CPU)
    base = load_unsharded(ROOT / "examples" / "tiny_base", "int8")
    with other_device() as device:
        moved(base)
        result = run(base, device)
    prompts = dict(
        zip(
            (p["name"] for p in PROMPTS),
            errors(result["prompts"], expected["prompts"]),
            strict=True,
        )
    )
    return {
        "prompts": prompts,
        "scores": [expected["scores"], result["scores"]],
        "texts": [expected["texts"], result["texts"]],
        "waits": result["waits"],
        "batches": result["batches"],
    }


def compared_inference() -> list[dict[str, Any]]:
    """Answer requests and compare texts on the CPU and on the device."""
    base = load_unsharded(ROOT / "examples" / "tiny_base", "int8")
    expected = inference(base, CPU)
    with other_device() as device:
        moved(base)
        return [expected, inference(base, device)]


def inference(base: PromptedBase, device: torch.device) -> dict[str, Any]:
    """Decode requests with different prompts in one batch; compare states and distributions."""
    os.chdir(ROOT)
    config = load("examples/quickstart.yaml")
    files = open_base(config.base)
    engine: Any = OneRank(device)
    stop = StopCriteria.of(files.generation, files.tokenizer, config.tasks[0])
    texts = [files.tokenizer(text)["input_ids"] for text in ("A cough.", "Some deer.", "Pain.")]
    drawn = torch.randn(4, base.hidden_size, generator=torch.Generator().manual_seed(0)) / 2
    past = PrefixKeyValues(keys_and_values(engine, base, texts[0]).to(device))
    prompts: list[SoftPrompt] = [VirtualTokens(drawn.to(device)), past]
    decoder = StreamingDecoder(engine, base, prompts)
    pieces: list[Piece] = []

    def receive(piece: Piece) -> None:
        pieces.append(piece)
        if sum(piece.finish is not None for piece in pieces) == len(streams):
            decoder.close()

    streams: list[Stream] = []
    for ids, prompt in zip(texts, (*prompts, None), strict=True):
        request = GenerationRequest(tuple(ids), 0, prompt, stop, 5)
        streams.append(decoder.submit(request, Sampling(top_logprobs=2), receive))
    decoder.run()
    assert decoder.failure is None, decoder.failure
    evaluator = Evaluator(engine, base, files.tokenizer, TokenBudget(1024))
    anchors = read_anchors(evaluator, texts, [0, 1, 2], lambda count: None)
    return {
        "texts": [stream.ids for stream in streams],
        "states": mean_hidden_states(evaluator, texts, lambda count: None).tolist(),
        "nearest": nearest(evaluator, texts, anchors, [[]] * 3, 2, lambda count: None),
    }


def run(base: PromptedBase, device: torch.device) -> dict[str, Any]:
    os.chdir(ROOT)
    quickstart = load("examples/quickstart.yaml").model_dump(exclude_unset=True)
    quickstart |= {"prompts": PROMPTS, "training": {"steps": STEPS, "tokens_per_step": TOKENS}}
    quickstart |= {"search": {"init_share": 20}}  # the longest search, however few steps
    config = RunConfig.model_validate(quickstart)
    files = open_base(config.base)
    tasks = load_tasks(config, files.tokenizer, 512, files.config.vocab_size)
    engine: Any = OneRank(device)
    (teacher,) = tasks["triage"].teachers.values()
    teachers = [VirtualTokens(embedding_function(base, device)(teacher.token_ids))]
    evaluator = Evaluator(engine, base, files.tokenizer, TokenBudget(1024), teachers)

    with open(os.devnull, "w") as nothing:
        console = Console(nothing, nothing)
        screen = LossInitScorer(config, tasks, evaluator, console)
        bank = make_bank(config, engine, base, files, screen, console.warn)
    feed, batches = BatchSource(config, tasks), 0
    waits = []
    for _ in range(STEPS):
        Waits.count = 0
        prompts = bank.virtual_tokens()
        step_batch = prepare_step(
            feed.next_step(bank.active), prompt_lengths(prompts), RankInfo(0, 1, CPU), TOKENS
        )
        bank.update(batch_gradients(engine, base, step_batch, prompts, teachers=teachers).gradients)
        waits.append(Waits.count)
        batches = len(step_batch.batches)
    judged = bank.judged()
    ending = StopCriteria.of(files.generation, files.tokenizer, config.tasks[0])
    requests = [Request(tasks["triage"].evaluation["validation"], 0)]
    inputs = [
        files.tokenizer(text)["input_ids"] for text in ("A cough.\nAnswer:", "A deer.\nAnswer:")
    ]
    return {
        "prompts": [prompt.tensor.cpu() for prompt in judged],
        "scores": [scored.scores for scored in evaluator.score(requests, judged)],
        "texts": [
            [text.ids for text in generate(engine, base, ending, inputs, prompt, 4)]
            for prompt in judged
        ],
        "waits": waits,
        "batches": batches,
    }


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # torch's threads for a device that is not there do not end
