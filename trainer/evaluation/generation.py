"""Greedy decoding with a key-value cache on a sharded base model, all ranks in lockstep.

As in transformers' ``generate``, the base model's generation config defines end tokens and
penalties. A task adds EOS, if its targets are trained with one, and stop strings.

Shape letters: B rows of a batch, V vocabulary, n tokens of a text, L layers, A key-value heads,
D head size.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.distributed.deepspeed_engine import Engine
from trainer.evaluation.stop_criteria import StopCriteria
from trainer.model.decode_step import DecodeStep
from trainer.model.generation_config import logits_processors
from trainer.model.prompted_model import PromptedBase
from trainer.prompts.soft_prompt import SoftPrompt

BATCH_ROWS = 64


@dataclass(frozen=True)
class Generated:
    """A generated text.

    Attributes:
        ids: its tokens, without the end token.
        log_probability: natural logarithm of its probability under the base model, the end token or
            stop string included; penalties of the generation config do not change it.
    """

    ids: list[int]
    log_probability: float


@torch.no_grad()
def generate(
    engine: Engine,
    base: PromptedBase,
    stop: StopCriteria,
    inputs: Sequence[Sequence[int]],
    virtual_tokens: SoftPrompt | None,
    max_new_tokens: int,
    between_batches: Callable[[int], object] = lambda rows: None,
    max_tokens: int | None = None,
    prompt_at: Sequence[int] = (),
    around: Callable[[Sequence[int]], AbstractContextManager[object]] = lambda rows: nullcontext(),
) -> list[Generated]:
    """Generate the tokens after each input, up to the first end token; a collective.

    Rows are split over the ranks. A rank that has finished continues in lockstep with the others,
    because every forward all-gathers layers from all of them.

    Args:
        inputs: token ids of each row.
        between_batches: called on all ranks with the number of rows completed since the last call;
            an exception from it ends the generation.
        max_tokens: limit of a batch, which counts prompt, input and generated text of all its
            rows. A batch has at least one row.
        prompt_at: for each input, the number of its tokens before the virtual tokens; default: 0.
        around: returns the context in which the rows with these indices are decoded.

    Returns:
        The generated text of each row, on every rank; ``stop.text`` decodes its ids.
    """
    # Longest first, so that the rows of a batch have similar lengths.
    order = sorted(range(len(inputs)), key=lambda i: -len(inputs[i]))
    batch_size = min(BATCH_ROWS, -(-len(inputs) // engine.world_size))
    if max_tokens is not None:
        num_virtual = 0 if virtual_tokens is None else virtual_tokens.num_virtual_tokens
        row = max(map(len, inputs), default=0) + num_virtual + max_new_tokens
        batch_size = min(batch_size, max(1, max_tokens // row))
    generated: dict[int, Generated] = {}
    with base.unpacked():
        for start in range(0, len(order), batch_size * engine.world_size):
            between_batches(batch_size * engine.world_size if start else 0)
            mine = order[start + engine.rank :: engine.world_size][:batch_size]
            read = mine or order[:1]
            rows = [inputs[i] for i in read]
            places = [prompt_at[i] for i in read] if prompt_at else []
            with around(read):
                batch = _decode(engine, base, stop, rows, virtual_tokens, max_new_tokens, places)
            generated |= dict(zip(mine, batch, strict=False))
    merged = ChainMap(*engine.all_gather(generated))
    return [merged[i] for i in range(len(inputs))]


@torch.no_grad()
def keys_and_values(engine: Engine, base: PromptedBase, token_ids: Sequence[int]) -> Tensor:
    """Compute the keys and values of a text, [n, L, 2, A, D], fp32 on the CPU; a collective.

    All ranks pass the same ids and receive the tensor of rank 0.
    """
    ids_1n = torch.tensor([list(token_ids)], device=engine.device)
    cache = base.new_cache()
    with base.unpacked():
        base(DecodeStep(ids_1n, torch.ones_like(ids_1n), cache), [])
    return engine.broadcast(cache.read().float().cpu() if engine.is_main else None)


def _left_padded(
    rows: Sequence[Sequence[int]], num_virtual: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return token ids with padding on the left, and the mask of these and the virtual tokens."""
    longest = max(map(len, rows))
    pads = [longest - len(row) for row in rows]
    token_ids = torch.tensor([[0] * pad + list(row) for pad, row in zip(pads, rows, strict=True)])
    mask = torch.tensor([[0] * pad + [1] * (longest + num_virtual - pad) for pad in pads])
    return token_ids.to(device), mask.to(device)


def _decode(
    engine: Engine,
    base: PromptedBase,
    stop: StopCriteria,
    rows: Sequence[Sequence[int]],
    virtual_tokens: SoftPrompt | None,
    max_new_tokens: int,
    prompt_at: Sequence[int],
) -> list[Generated]:
    num_virtual = 0 if virtual_tokens is None else virtual_tokens.num_virtual_tokens
    token_ids, mask = _left_padded(rows, num_virtual, engine.device)
    prompts = [] if virtual_tokens is None else [virtual_tokens]
    penalties = [logits_processors(base.model, row, max_new_tokens, engine.device) for row in rows]

    cache = base.new_cache()
    generated: list[list[int]] = [[] for _ in rows]
    log_probabilities = [0.0] * len(rows)
    unfinished = list(range(len(rows)))
    for _ in range(max_new_tokens):
        logits_BV = base(DecodeStep(token_ids, mask, cache, prompt_at), prompts).logits_BV
        raw_BV = logits_BV.clone() if penalties[0] else logits_BV
        if penalties[0]:
            # Each row separately, without its padding.
            seen = [
                torch.tensor([[*row, *ids]], device=engine.device)
                for row, ids in zip(rows, generated, strict=True)
            ]
            rows_BV = zip(penalties, seen, logits_BV.split(1), strict=True)
            logits_BV = torch.cat([penalty(ids, logits) for penalty, ids, logits in rows_BV])
        next_B = logits_BV.argmax(-1)
        tokens = next_B.tolist()
        added = (raw_BV.gather(1, next_B[:, None])[:, 0] - raw_BV.logsumexp(-1)).tolist()
        for row in unfinished:
            generated[row].append(tokens[row])
            log_probabilities[row] += added[row]
        unfinished = [row for row in unfinished if not stop.is_completed(generated[row])]
        if not engine.any_rank(bool(unfinished)):
            break
        token_ids = next_B[:, None]
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
    return [
        Generated(stop.cut(ids), total)
        for ids, total in zip(generated, log_probabilities, strict=True)
    ]
