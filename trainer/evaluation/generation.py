"""Decoding with a key-value cache on a sharded base model, all ranks in lockstep.

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
from trainer.evaluation.token_sampling import Sampling, TokenChooser
from trainer.model.decode_step import DecodeStep
from trainer.model.families import context_length
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
    samplings: Sequence[Sequence[Sampling]] = (),
) -> list[Generated]:
    """Generate the tokens after each input, up to the first end token or the end of the context.

    A collective.

    Texts are split over the ranks. A rank that has finished continues in lockstep with the others,
    because every forward all-gathers layers from all of them. An input with several texts in a
    batch is read once.

    Args:
        inputs: token ids of each row.
        between_batches: called on all ranks with the number of texts completed since the last
            call; an exception from it ends the generation.
        max_tokens: limit of a batch, which counts prompt, input and generated text of all its
            texts. A batch has at least one text.
        prompt_at: for each input, the number of its tokens before the virtual tokens; default: 0.
        around: returns the context in which the rows with these indices are decoded.
        samplings: for each input, how the tokens of each of its texts are chosen; default: one
            text of the most probable tokens.

    Returns:
        The generated texts in the order of the inputs, those of an input in the order of
        ``samplings``, on every rank; ``stop.text`` decodes their ids.
    """
    samplings = samplings or [[Sampling()]] * len(inputs)
    texts = [(row, number) for row, own in enumerate(samplings) for number in range(len(own))]
    # Longest first, so that the rows of a batch have similar lengths.
    order = sorted(texts, key=lambda text: -len(inputs[text[0]]))
    batch_size = min(BATCH_ROWS, -(-len(order) // engine.world_size))
    if max_tokens is not None:
        num_virtual = 0 if virtual_tokens is None else virtual_tokens.num_virtual_tokens
        row = max(map(len, inputs), default=0) + num_virtual + max_new_tokens
        batch_size = min(batch_size, max(1, max_tokens // row))
    generated: dict[tuple[int, int], Generated] = {}
    with base.unpacked():
        for start in range(0, len(order), batch_size * engine.world_size):
            between_batches(batch_size * engine.world_size if start else 0)
            window = order[start : start + batch_size * engine.world_size]
            share = -(-len(window) // engine.world_size)
            mine = window[engine.rank * share :][:share]
            written = mine or order[:1]
            read = list(dict.fromkeys(row for row, _ in written))
            with around(read):
                batch = _decode(
                    *(engine, base, stop),
                    [inputs[row] for row in read],
                    virtual_tokens,
                    max_new_tokens,
                    [prompt_at[row] for row in read] if prompt_at else [],
                    [(read.index(row), samplings[row][number]) for row, number in written],
                )
            generated |= dict(zip(mine, batch, strict=False))
    merged = ChainMap(*engine.all_gather(generated))
    return [merged[text] for text in texts]


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
    texts: Sequence[tuple[int, Sampling]],
) -> list[Generated]:
    """Generate the texts of a batch.

    Args:
        texts: of each text the index of its row, and how its tokens are chosen. The texts of a row
            follow each other.
    """
    num_virtual = 0 if virtual_tokens is None else virtual_tokens.num_virtual_tokens
    token_ids, mask = _left_padded(rows, num_virtual, engine.device)
    prompts = [] if virtual_tokens is None else [virtual_tokens]
    context = context_length(base.model.config) - num_virtual
    rooms = [min(max_new_tokens, max(1, context - len(rows[row]))) for row, _ in texts]
    choosers = [
        TokenChooser(base.model, rows[row], room, sampling, engine.device)
        for (row, sampling), room in zip(texts, rooms, strict=True)
    ]

    cache = base.new_cache()
    generated: list[list[int]] = [[] for _ in texts]
    log_probabilities = [0.0] * len(texts)
    unfinished = list(range(len(texts)))
    for step in range(max_new_tokens):
        logits_BV = base(DecodeStep(token_ids, mask, cache, prompt_at), prompts).logits_BV
        if step == 0 and len(texts) > len(rows):
            row_of_text_B = torch.tensor([row for row, _ in texts], device=engine.device)
            cache.reorder_cache(row_of_text_B)
            logits_BV, mask = logits_BV[row_of_text_B], mask[row_of_text_B]
        tokens = logits_BV.argmax(-1).tolist()
        for text in unfinished:
            seen = [*rows[texts[text][0]], *generated[text]]
            tokens[text] = choosers[text].choose(seen, logits_BV[text], tokens[text]).token_id
        next_B = torch.tensor(tokens, device=engine.device)
        added = (logits_BV.gather(1, next_B[:, None])[:, 0] - logits_BV.logsumexp(-1)).tolist()
        for text in unfinished:
            generated[text].append(tokens[text])
            log_probabilities[text] += added[text]
        unfinished = [
            text
            for text in unfinished
            if len(generated[text]) < rooms[text] and not stop.is_completed(generated[text])
        ]
        if not engine.any_rank(bool(unfinished)):
            break
        token_ids = next_B[:, None]
        mask = torch.cat([mask, mask.new_ones(len(texts), 1)], dim=1)
    return [
        Generated(stop.cut(ids), total)
        for ids, total in zip(generated, log_probabilities, strict=True)
    ]
