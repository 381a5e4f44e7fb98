"""Greedy decoding with a key-value cache on a sharded base, ranks in lockstep.

Shape letters: B rows of a batch, L longest row, T tokens so far, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from trainer.base.model import DecodeStep, PromptedBase
from trainer.base.past import PastCache
from trainer.engine import Engine

BATCH_ROWS = 64


@torch.no_grad()
def generate(
    engine: Engine,
    base: PromptedBase,
    tokenizer: PreTrainedTokenizerBase,
    inputs: Sequence[Sequence[int]],
    virtual_tokens: Tensor | None,
    max_new_tokens: int,
    between_batches: Callable[[], object] = lambda: None,
    max_tokens: int | None = None,
) -> list[str]:
    """What the base writes after each input, without special tokens; the same list on every rank.

    Rows are split over the ranks. A rank that has finished goes on in step with the others, because
    every forward gathers layers from all of them.

    Args:
        inputs: token ids of each row.
        virtual_tokens: the prompt [P, H], its keys and values [P, L, 2, A, D], or None.
        between_batches: is called on all ranks alike; what it raises ends all of it.
        max_tokens: of the rows of a batch with all that stands before and behind them; one row is
            always read.
    """
    # Longest first: rows of a batch are then of similar length.
    order = sorted(range(len(inputs)), key=lambda i: -len(inputs[i]))
    batch_size = min(BATCH_ROWS, -(-len(inputs) // engine.world_size))
    if max_tokens is not None:
        num_virtual = 0 if virtual_tokens is None else len(virtual_tokens)
        row = max(map(len, inputs), default=0) + num_virtual + max_new_tokens
        batch_size = min(batch_size, max(1, max_tokens // row))
    texts: dict[int, str] = {}
    with base.unpacked():
        for start in range(0, len(order), batch_size * engine.world_size):
            between_batches()
            mine = order[start + engine.rank :: engine.world_size][:batch_size]
            rows = [inputs[i] for i in mine or order[:1]]
            written = _decode(engine, base, tokenizer, rows, virtual_tokens, max_new_tokens)
            texts |= dict(zip(mine, written, strict=False))
    merged: dict[int, str] = {}
    for part in engine.all_gather(texts):
        merged |= part
    return [merged[i] for i in range(len(inputs))]


@torch.no_grad()
def keys_and_values(engine: Engine, base: PromptedBase, token_ids: Sequence[int]) -> Tensor:
    """What the base makes of a text: keys and values [n, L, 2, A, D], fp32 on the CPU.

    Every rank calls it with the same ids and gets what rank 0 has found.
    """
    ids_1n = torch.tensor([list(token_ids)], device=engine.device)
    cache = PastCache()
    with base.unpacked():
        base(DecodeStep(ids_1n, torch.ones_like(ids_1n), cache), [])
    return engine.broadcast(cache.read().float().cpu() if engine.is_main else None)


def _decode(
    engine: Engine,
    base: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Sequence[int]],
    virtual_tokens: Tensor | None,
    max_new_tokens: int,
) -> list[str]:
    eos = tokenizer.eos_token_id
    longest = max(map(len, rows))
    pads = [longest - len(row) for row in rows]
    token_ids = torch.tensor([[0] * pad + list(row) for pad, row in zip(pads, rows, strict=True)])
    num_virtual = 0 if virtual_tokens is None else virtual_tokens.shape[0]
    mask = torch.tensor([[0] * pad + [1] * (longest + num_virtual - pad) for pad in pads])
    token_ids, mask = token_ids.to(engine.device), mask.to(engine.device)
    prompts = [] if virtual_tokens is None else [virtual_tokens]

    cache = PastCache()
    written: list[Tensor] = []
    finished = torch.zeros(len(rows), dtype=torch.bool, device=engine.device)
    for _ in range(max_new_tokens):
        next_B = base(DecodeStep(token_ids, mask, cache), prompts).argmax(-1)
        written.append(next_B)
        finished |= next_B == eos
        if not engine.any(not bool(finished.all())):
            break
        token_ids = next_B[:, None]
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
    return [_text(tokenizer, ids, eos) for ids in torch.stack(written, dim=1).tolist()]


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int], eos: int | None) -> str:
    end = ids.index(eos) if eos in ids else len(ids)
    text: str = tokenizer.decode(ids[:end], skip_special_tokens=True)
    return text
