"""PEFT's methods on packed rows: virtual tokens and the rows' common beginning once per batch.

The modules are PEFT's. Only the layout of a batch differs from ``PeftModel.forward``, which repeats
the prompt before each row and pads: rows follow each other, and attention reads one row at a time.
Loss and gradients are equal, and PEFT is not slowed down by padding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from benchmarks.learning import peers
from benchmarks.learning.peers import PeerMethod
from benchmarks.peers.counters import FlopCounter
from trainer.data.task_data import EvalSet
from trainer.data.token_table import Example

#: Text tokens of a packed batch in scoring.
SCORED_TOKENS = 640
#: Name of ``attend_by_row`` in transformers.
BY_ROW = "packed_rows"
#: Keys and values [1, heads, tokens, features] of every layer.
KeysAndValues = list[tuple[Tensor, Tensor]]
#: Settings of training besides the learning rate: those of transformers' Trainer.
OPTIMIZER = {"optimizer": "AdamW", "schedule": "linear", "warmup": 0, "clipping": 1.0}


@dataclass(frozen=True)
class PeerArm:
    """A method of PEFT, and the learning rates to choose from."""

    method: PeerMethod
    rates: tuple[float, ...]


PEERS = {
    "PEFT prompt tuning, text": PeerArm(peers.FROM_TEXT, (0.003, 0.01, 0.03, 0.1, 0.3)),
    "PEFT LoRA r8": PeerArm(peers.LORA, (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)),
    "PEFT IA3": PeerArm(peers.IA3, (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)),
    "PEFT prompt tuning, vocab": PeerArm(peers.FROM_VOCABULARY, (0.003, 0.01, 0.03, 0.1, 0.3)),
    "PEFT p-tuning": PeerArm(peers.P_TUNING, (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)),
    "PEFT prefix tuning": PeerArm(peers.PREFIX_TUNING, (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)),
}


@dataclass(frozen=True)
class PackedRows:
    """Rows in one sequence of T tokens, without what all rows begin with.

    Attributes:
        row_T, branch_T: the row of a token, and its candidate (0: the text before all candidates).
        read_at_N, labels_N: position whose logits predict a label, and the label.
        slots_N: example of each label, numbered in the order of the batch.
    """

    ids_T: Tensor
    positions_T: Tensor
    row_T: Tensor
    branch_T: Tensor
    read_at_N: Tensor
    labels_N: Tensor
    slots_N: Tensor

    def masks(self) -> Iterator[Tensor]:
        """Yield [N, N] of each row: whether a token (first axis) sees another one of the row.

        It sees the earlier ones of its text and candidate.
        """
        counts = torch.unique_consecutive(self.row_T, return_counts=True)[1].tolist()
        for branch_N in self.branch_T.split(counts):
            same_NN = (branch_N[None] == 0) | (branch_N[:, None] == branch_N[None])
            yield same_NN & _causal(len(branch_N))


@dataclass(frozen=True)
class Attended:
    """What the tokens of a packed batch attend to.

    Attributes:
        before: keys and values without a token in this batch, seen by all.
        leading: first tokens, seen by all later ones.
        masks: [N, N] of each row that follows; its tokens see no other row.
    """

    before: int
    leading: int
    masks: tuple[Tensor, ...]


def _causal(count: int) -> Tensor:
    return torch.ones(count, count, dtype=torch.bool).tril()


def attend_by_row(
    module: Any,
    query_1HTD: Tensor,
    key_1GSD: Tensor,
    value_1GSD: Tensor,
    attention_mask: None,
    *,
    attended: Attended,
    scaling: float,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Attention function of transformers, one row at a time; returns [1, T, H, D]."""
    groups, before, leading = module.num_key_value_groups, attended.before, attended.leading
    sizes = [len(mask_NN) for mask_NN in attended.masks]
    keys_values = torch.stack([key_1GSD, value_1GSD]).repeat_interleave(groups, 2)
    shared, *own = keys_values.split([before + leading, *sizes], 3)
    queries = query_1HTD.split([leading, *sizes], 2)
    # The leading tokens see each other, and all that is before them.
    masks, seen = [_causal(before + leading)[before:]], [shared]
    for mask_NN, row in zip(attended.masks, own, strict=True):
        all_seen = mask_NN.new_ones(len(mask_NN), before + leading)
        masks.append(torch.cat([all_seen, mask_NN], 1))
        seen.append(torch.cat([shared, row], 3))
    outputs = [
        scaled_dot_product_attention(q, kv[0], kv[1], mask, scale=scaling)
        for q, kv, mask in zip(queries, seen, masks, strict=True)
        if q.shape[2]
    ]
    return torch.cat(outputs, 2).transpose(1, 2).contiguous(), None


@contextmanager
def _by_row(model: Any) -> Iterator[None]:
    """Compute attention of a transformers model with ``attend_by_row``."""
    from transformers import AttentionInterface

    AttentionInterface.register(BY_ROW, attend_by_row)
    earlier = model.config._attn_implementation
    model.config._attn_implementation = BY_ROW
    try:
        yield
    finally:
        model.config._attn_implementation = earlier


def pack(rows: Sequence[Sequence[Example]], common: int) -> PackedRows:
    """Pack rows, each with one candidate or several that continue the same text.

    Args:
        common: number of tokens that all rows begin with.
    """
    tokens, labels, slot = list[tuple[int, int, int, int]](), list[tuple[int, int, int]](), 0
    for number, candidates in enumerate(rows):
        start, _ = candidates[0].last_target
        text = candidates[0].input_ids[common:start]
        tokens += [(token, common + i, number, 0) for i, token in enumerate(text)]
        last_of_text = len(tokens) - 1
        for branch, example in enumerate(candidates, 1):
            read_at, target = last_of_text, example.input_ids[slice(*example.last_target)]
            for i, token in enumerate(target):
                labels.append((read_at, token, slot))
                if i < len(target) - 1:  # nothing is predicted after the last label
                    tokens.append((token, start + i, number, branch))
                    read_at = len(tokens) - 1
            slot += 1
    columns = (torch.tensor(column) for column in zip(*tokens, strict=True))
    return PackedRows(*columns, *(torch.tensor(column) for column in zip(*labels, strict=True)))


def common_tokens(rows: Iterable[Example]) -> tuple[int, ...]:
    """Return the tokens that all rows begin with."""
    texts = [row.input_ids[: row.target_start] for row in rows]
    shortest, longest = min(texts), max(texts)
    same = takewhile(lambda pair: pair[0] == pair[1], zip(shortest, longest, strict=False))
    return tuple(token for token, _ in same)


class PackedModel:
    """Reads packed rows with a PEFT model, or with the base alone.

    Args:
        leading: tokens that are read before all rows, after the prompt.
        replaced: number of tokens at the beginning of each row that ``leading`` replaces; None:
            all rows begin with ``leading``.
    """

    def __init__(self, model: Any, leading: Sequence[int], replaced: int | None = None) -> None:
        from peft import PeftModel

        self.model, self._leading = model, torch.tensor(list(leading), dtype=torch.long)
        self.replaced = len(leading) if replaced is None else replaced
        self._makes_prompt = (
            isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning
        )
        self._causal = model
        if isinstance(model, PeftModel):
            self._causal = model.base_model if self._makes_prompt else model.base_model.model
        self._kept: KeysAndValues | None = None

    def _prompt(self) -> tuple[Tensor, KeysAndValues]:
        """Embeddings [P, H] of virtual tokens, and keys and values; one of them is empty."""
        embed = self._causal.get_input_embeddings()
        nothing = embed(torch.zeros(0, dtype=torch.long))
        if not self._makes_prompt:
            return nothing, []
        prompt = self.model.get_prompt(batch_size=1)
        if isinstance(prompt, Tensor):
            return prompt[0], []
        return nothing, [(layer.keys, layer.values) for layer in prompt.layers]

    def losses(self, batch: PackedRows) -> Tensor:
        """Negative log-likelihood of every label, [N]; the prompt is computed for this batch."""
        virtual_PH, past = self._prompt()
        leading_LH = torch.cat([virtual_PH, self._causal.get_input_embeddings()(self._leading)])
        return self._read(batch, leading_LH, past)

    @torch.no_grad()
    def scores(self, batch: PackedRows) -> Tensor:
        """As ``losses``, with keys and values of prompt and common tokens from the first call."""
        if self._kept is None:
            virtual_PH, past = self._prompt()
            leading_PH = torch.cat([virtual_PH, self._causal.get_input_embeddings()(self._leading)])
            count, before = len(leading_PH), past[0][0].shape[2] if past else 0
            kept = _cache(past)
            if count:
                self._causal.model(
                    inputs_embeds=leading_PH[None],
                    position_ids=torch.arange(before, before + count)[None],
                    past_key_values=kept,
                    use_cache=True,
                )
            self._kept = [(one.keys, one.values) for one in kept.layers]
        nothing = self._causal.get_input_embeddings()(torch.zeros(0, dtype=torch.long))
        return self._read(batch, nothing, self._kept)

    def _read(self, batch: PackedRows, leading_LH: Tensor, past: KeysAndValues) -> Tensor:
        """Read leading tokens, behind earlier keys and values, and then the rows."""
        before, leading = past[0][0].shape[2] if past else 0, len(leading_LH)
        tokens_TH = self._causal.get_input_embeddings()(batch.ids_T)
        shifted_T = batch.positions_T + before + leading - self.replaced
        positions = [torch.arange(before, before + leading), shifted_T]
        with _by_row(self._causal):
            hidden_TH = self._causal.model(
                inputs_embeds=torch.cat([leading_LH, tokens_TH])[None],
                position_ids=torch.cat(positions)[None],
                past_key_values=_cache(past) if past else None,
                use_cache=False,
                attended=Attended(before, leading, tuple(batch.masks())),
            ).last_hidden_state[0]
        logits_NV = self._causal.lm_head(hidden_TH[leading + batch.read_at_N])
        return cross_entropy(logits_NV.float(), batch.labels_N, reduction="none")


def _cache(past: KeysAndValues) -> Any:
    from transformers import DynamicCache

    return DynamicCache(past) if past else DynamicCache()


def score(model: PackedModel, rows: EvalSet) -> dict[str, Any]:
    """Return loss and accuracy, and of each row its loss and whether it is correct."""
    by_row: dict[int, Tensor] = {}
    order = sorted(range(len(rows.candidates)), key=lambda i: rows.candidates[i][0].num_tokens)
    for part in _portions(order, rows, model.replaced):
        candidates = [rows.candidates[i] for i in part]
        batch = pack(candidates, model.replaced)
        losses_N = model.scores(batch).double()
        width = rows.candidates.width
        sums = torch.zeros(len(part) * width, dtype=torch.float64)
        sums.index_add_(0, batch.slots_N, losses_N)
        by_row |= dict(zip(part, sums.view(-1, width), strict=True))
    nll_RC = torch.stack([by_row[i] for i in range(len(by_row))])
    right_R = nll_RC[torch.arange(len(nll_RC)), torch.tensor(rows.gold)].tolist()
    correct_R = [int(a == b) for a, b in zip(nll_RC.argmin(1).tolist(), rows.gold, strict=True)]
    return {
        "loss": sum(right_R) / sum(rows.label_counts),
        "accuracy": sum(correct_R) / len(correct_R),
        "losses": [round(a, 4) for a in right_R],
        "labels": list(rows.label_counts),
        "correct": correct_R,
    }


def _portions(order: Sequence[int], rows: EvalSet, common: int) -> Iterator[list[int]]:
    part, tokens = list[int](), 0
    for i in order:
        own = rows.candidates[i]
        count = own[0].target_start - common + sum(example.num_labels for example in own)
        if part and tokens + count > SCORED_TOKENS:
            yield part
            part, tokens = [], 0
        part.append(i)
        tokens += count
    yield part


def train(
    model: Any,
    updates: Iterator[list[Example]],
    common: Sequence[int],
    steps: int,
    rate: float,
    after: Callable[[int], None] = lambda step: None,
) -> dict[str, Any]:
    """Train with AdamW, clipping to 1 and linear decay; return losses and costs.

    Args:
        after: called after each step, with its number from 1; not a part of ``train_seconds``.
    """
    from transformers import get_linear_schedule_with_warmup

    model.train()
    packed = PackedModel(model, common)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, 0, steps)
    losses, rows_read, text_tokens, flops, counted = list[float](), 0, 0, 0, 0
    seconds = 0.0
    for step in range(1, steps + 1):
        started = time.perf_counter()
        rows = next(updates)
        batch = pack([[row] for row in rows], packed.replaced)
        if step == 1:
            with FlopCounter() as counter:
                loss = _update(packed, batch, trained)
            flops, counted = counter.total, sum(row.num_tokens for row in rows)
        else:
            loss = _update(packed, batch, trained)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(round(loss, 4))
        rows_read += len(rows)
        text_tokens += sum(row.num_tokens for row in rows)
        seconds += time.perf_counter() - started
        after(step)
    model.eval()
    return {
        "train_losses": losses,
        "train_seconds": round(seconds, 1),
        "rows_read": rows_read,
        "text_tokens": text_tokens,
        "train_flops": flops * text_tokens / counted,
        "trained_parameters": sum(parameter.numel() for parameter in trained),
    }


def _update(packed: PackedModel, batch: PackedRows, trained: Sequence[Tensor]) -> float:
    loss = packed.losses(batch).mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    return float(loss.detach())
