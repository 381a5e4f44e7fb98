"""Parts of a run on a device: the same numbers and texts are expected of any other."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.one_rank import OneRank
from trainer.config import RunConfig, load
from trainer.data.task_data import load_tasks
from trainer.distributed.prefetch import RankInfo, prepare_step
from trainer.evaluation.evaluator import Evaluator
from trainer.evaluation.generation import generate, keys_and_values
from trainer.evaluation.inspection.elicitation import elicit
from trainer.evaluation.inspection.embedding_space import scan_vocabulary
from trainer.evaluation.inspection.sensitivity import measure_sensitivity
from trainer.evaluation.knn_prompting import nearest, read_anchors
from trainer.evaluation.read_texts import mean_hidden_states
from trainer.evaluation.scoring import Request
from trainer.evaluation.stop_criteria import StopCriteria
from trainer.evaluation.token_sampling import Sampling
from trainer.inference.requests import GenerationRequest
from trainer.inference.stream import Stream, StreamingDecoder
from trainer.inference.stream_text import Piece
from trainer.model.checkpoint_files import open_base
from trainer.model.prompted_model import PromptedBase
from trainer.packing.activation_memory import TokenBudget
from trainer.packing.batch_source import BatchSource
from trainer.prompts.soft_prompt import PrefixKeyValues, SoftPrompt, VirtualTokens, prompt_lengths
from trainer.runtime.console import Console
from trainer.training.init_scoring import LossInitScorer
from trainer.training.initial_bank import embedding_function, make_bank
from trainer.training.step import batch_gradients

STEPS, TOKENS = 2, 120
PROMPTS = [
    {
        **{"name": "words", "task": "triage", "num_virtual_tokens": 4, "init": "search"},
        **{"noise": 0.1, "ema": 0.9},
    },
    {"name": "mlp", "task": "animals", "method": "p_tuning", "num_virtual_tokens": 3},
    {"name": "past", "task": "animals", "method": "prefix_tuning", "num_virtual_tokens": 4},
    {
        "name": "reader",
        "task": "animals",
        "method": "p_tuning",
        "encoder": "text",
        "num_virtual_tokens": 3,
        "init": {"text": "Is it a deer?"},
    },
    {
        "name": "residual",
        "task": "triage",
        "method": "p_tuning",
        "encoder": "residual",
        "num_virtual_tokens": 4,
    },
    {"name": "adafactor", "task": "triage", "num_virtual_tokens": 4, "optimizer": "adafactor"},
    {
        "name": "taught",
        "task": "triage",
        "num_virtual_tokens": 2,
        "objective": "distill",
        "teacher": "What is wrong with this patient?",
    },
]
#: Uses a kernel of CUDA.
LSTM = {"name": "lstm", "task": "animals", "method": "p_tuning", "encoder": "lstm", "init": "vocab"}


def answered(base: PromptedBase, device: torch.device) -> dict[str, Any]:
    """Decode requests with different prompts in one batch; compare states and distributions."""
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


def trained(
    base: PromptedBase,
    device: torch.device,
    count: Callable[[], int] = lambda: 0,
    prompts: Sequence[dict[str, Any]] = PROMPTS,
) -> dict[str, Any]:
    """Search initial prompts, train, score, generate and inspect.

    Args:
        count: of waits so far, of host and device for each other.
    """
    quickstart = load("examples/quickstart.yaml").model_dump(exclude_unset=True)
    quickstart |= {"prompts": [*prompts], "training": {"steps": STEPS, "tokens_per_step": TOKENS}}
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
        before = count()
        values = bank.virtual_tokens()
        step_batch = prepare_step(
            feed.next_step(bank.active), prompt_lengths(values), RankInfo(0, 1, device), TOKENS
        )
        bank.update(batch_gradients(engine, base, step_batch, values, teachers=teachers).gradients)
        waits.append(count() - before)
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
        "inspected": _inspected(evaluator, requests, judged, embedding_function(base, device)),
        "waits": waits,
        "batches": batches,
    }


def _inspected(
    evaluator: Evaluator,
    requests: Sequence[Request],
    prompts: Sequence[SoftPrompt],
    embed: Callable[[Sequence[int]], Tensor],
) -> list[Any]:
    """Measure the prompt of virtual tokens that the first request names, and describe it."""
    tokens, other = prompts[0], prompts[2]
    assert isinstance(tokens, VirtualTokens)
    rows = requests[0].rows
    of_each = measure_sensitivity(evaluator, [Request(rows, 0), Request(rows, 1)], [tokens, other])
    vocabulary = range(evaluator.base.vocab_size)
    scan = scan_vocabulary(embed, vocabulary, tokens.tensor, 2)
    example = rows.candidates[0][0]
    texts = elicit(evaluator, [tokens], [example], ["Name the season: spring or autumn"], 512)
    attention = [one.attention_LP for one in of_each if one.attention_LP is not None]
    assert len(attention) == len(of_each)
    measured = [*attention, *(one.gradient_P for one in of_each)]
    return [
        [x.flatten().tolist() for x in measured],
        [[token for token, _ in of_vector] for of_vector in scan.cosine],
        [one.text for one in texts[0]],
    ]
