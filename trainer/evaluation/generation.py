"""Greedy decoding with a key-value cache on a sharded base, ranks in lockstep.

A text ends, as in transformers' ``generate``, at a token that the base's generation config names,
and is changed by that config's penalties. A task adds its own ends: EOS, where its targets are
trained with one, and stop strings.

Shape letters: B rows of a batch, L longest row, T tokens so far, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedTokenizerBase

from trainer.config import Task
from trainer.data.row_validation import MAX_PROBLEMS
from trainer.data.task_data import EvalSet
from trainer.data.text_readers import shorten
from trainer.distributed.deepspeed_engine import Engine
from trainer.model.attention.prefix_cache import PastCache
from trainer.model.generation_config import logits_processors
from trainer.model.prompted_model import DecodeStep, PromptedBase
from trainer.runtime.errors import BadInput

BATCH_ROWS = 64


@dataclass(frozen=True)
class StopCriteria:
    """What ends a generated text, and how its token ids become text.

    Attributes:
        token_ids: end marks; none of them is part of the text.
        strings: stop strings; the text ends before the first occurrence of any of them.
    """

    tokenizer: PreTrainedTokenizerBase
    token_ids: frozenset[int]
    strings: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, config: GenerationConfig, tokenizer: PreTrainedTokenizerBase, task: Task
    ) -> StopCriteria:
        """What ends the texts of a task.

        Args:
            config: of the base, for its ``eos_token_id`` and ``stop_strings``.
        """
        listed = config.eos_token_id
        ids = set(listed) if isinstance(listed, list) else {listed}
        if task.messages is None and task.append_eos:
            ids.add(tokenizer.eos_token_id)  # the end of every target
        stop = config.stop_strings or []
        strings = [*task.stop, *([stop] if isinstance(stop, str) else stop)]
        return cls(tokenizer, frozenset(ids - {None}), tuple(strings))

    def cut(self, ids: Sequence[int]) -> list[int]:
        """The tokens in front of the first end mark."""
        end = next((i for i, token in enumerate(ids) if token in self.token_ids), len(ids))
        return list(ids[:end])

    def is_reached(self, ids: Sequence[int]) -> bool:
        """Whether these tokens contain an end mark or, as text, a stop string."""
        if not self.token_ids.isdisjoint(ids):
            return True
        return self._has_stop(ids)

    def target(self, ids: Sequence[int]) -> str:
        """The text of a row's target: what ``text`` gives of a base that writes just these tokens.

        Stop strings do not cut it: a target that holds one cannot be generated.
        """
        return self._decode(self.cut(ids))

    def text(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of tokens as ``generate`` returns them, without its end.

        Special tokens stay by default: where they are labels, they tell texts apart.
        """
        return before_stop(self._decode(self.cut(ids), skip_special_tokens), self.strings)

    def is_completed(self, ids: Sequence[int]) -> bool:
        """Whether the last token is an end mark or completes a stop string.

        Looks at no more tokens than a stop string can have, so a long text costs no more.
        """
        if ids[-1] in self.token_ids:
            return True
        most = max((len(string.encode()) for string in self.strings), default=0)
        # A token has a byte at least; some are left out where a text begins, hence a few more.
        return self._has_stop(ids[-most - 8 :]) and self._has_stop(ids)

    def _has_stop(self, ids: Sequence[int]) -> bool:
        if not self.strings:
            return False
        text = self._decode(ids)
        return any(string in text for string in self.strings)

    def _decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        text = self.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        assert isinstance(text, str)
        return text


def before_stop(text: str, strings: Sequence[str]) -> str:
    """The text before the first occurrence of any of the strings."""
    return text[: min((i for s in strings if (i := text.find(s)) >= 0), default=len(text))]


def check_targets(rows: EvalSet, ending: StopCriteria) -> str | None:
    """Check that a base can generate the targets of a task whose metric compares texts.

    Returns:
        A warning if no target has an end that generation stops at.

    Raises:
        BadInput: a target contains a stop string, so generation ends before its end.
    """
    task = rows.task
    if task.metric not in ("exact_match", "f1"):
        return None
    examples = [c[right] for c, right in zip(rows.candidates, rows.gold, strict=True)]
    targets = [e.input_ids[slice(*e.label_spans[-1])] for e in examples]
    problems = []
    for example, ids in zip(examples, targets, strict=True) if ending.strings else ():
        text = ending.tokenizer.decode(ending.cut(ids), skip_special_tokens=True)
        if before_stop(text, ending.strings).strip() != text.strip():
            problems.append(
                f"{rows.rows.where(example.row)}: its target {shorten(text)} contains a string of "
                f"tasks.{task.name}.stop, so it cannot be generated; remove the row or the string"
            )
    if problems:
        more = len(problems) - MAX_PROBLEMS
        raise BadInput(problems[:MAX_PROBLEMS] + ([f"and {more} more rows"] if more > 0 else []))
    if any(ending.is_reached(ids) for ids in targets):
        return None
    return (
        f"tasks.{task.name}: no target has an end at which generation stops (end tokens: "
        f"{sorted(ending.token_ids) or 'none'}, as generation_config.json of base.model lists "
        f"them), so every text has max_new_tokens={task.max_new_tokens} tokens and "
        f"{task.metric} counts all of it; set tasks.{task.name}.stop, for example to the mark "
        "that ends a turn"
    )


@torch.no_grad()
def generate(
    engine: Engine,
    base: PromptedBase,
    ending: StopCriteria,
    inputs: Sequence[Sequence[int]],
    virtual_tokens: Tensor | None,
    max_new_tokens: int,
    between_batches: Callable[[int], object] = lambda rows: None,
    max_tokens: int | None = None,
) -> list[list[int]]:
    """The tokens that the base writes after each input, up to the first end mark.

    Every rank gets the same list; ``ending.text`` makes it text. Rows are split over the ranks. A
    rank that has finished continues in step with the others, because every forward gathers layers
    from all of them.

    Args:
        inputs: token ids of each row.
        virtual_tokens: the prompt [P, H], its keys and values [P, L, 2, A, D], or None.
        between_batches: called on all ranks with the number of rows done since the last call; what
            it raises ends the generation.
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
    written: dict[int, list[int]] = {}
    with base.unpacked():
        for start in range(0, len(order), batch_size * engine.world_size):
            between_batches(batch_size * engine.world_size if start else 0)
            mine = order[start + engine.rank :: engine.world_size][:batch_size]
            rows = [inputs[i] for i in mine or order[:1]]
            batch = _decode(engine, base, ending, rows, virtual_tokens, max_new_tokens)
            written |= dict(zip(mine, batch, strict=False))
    merged: dict[int, list[int]] = {}
    for part in engine.all_gather(written):
        merged |= part
    return [merged[i] for i in range(len(inputs))]


@torch.no_grad()
def keys_and_values(engine: Engine, base: PromptedBase, token_ids: Sequence[int]) -> Tensor:
    """Compute the keys and values of a text, [n, L, 2, A, D], fp32 on the CPU.

    Every rank calls it with the same ids and gets the tensor of rank 0.
    """
    ids_1n = torch.tensor([list(token_ids)], device=engine.device)
    cache = PastCache()
    with base.unpacked():
        base(DecodeStep(ids_1n, torch.ones_like(ids_1n), cache), [])
    return engine.broadcast(cache.read().float().cpu() if engine.is_main else None)


def _decode(
    engine: Engine,
    base: PromptedBase,
    ending: StopCriteria,
    rows: Sequence[Sequence[int]],
    virtual_tokens: Tensor | None,
    max_new_tokens: int,
) -> list[list[int]]:
    longest = max(map(len, rows))
    pads = [longest - len(row) for row in rows]
    token_ids = torch.tensor([[0] * pad + list(row) for pad, row in zip(pads, rows, strict=True)])
    num_virtual = 0 if virtual_tokens is None else virtual_tokens.shape[0]
    mask = torch.tensor([[0] * pad + [1] * (longest + num_virtual - pad) for pad in pads])
    token_ids, mask = token_ids.to(engine.device), mask.to(engine.device)
    prompts = [] if virtual_tokens is None else [virtual_tokens]
    penalties = [logits_processors(base.model, row, max_new_tokens, engine.device) for row in rows]

    cache = PastCache()
    written: list[list[int]] = [[] for _ in rows]
    unfinished = list(range(len(rows)))
    for _ in range(max_new_tokens):
        logits_BV = base(DecodeStep(token_ids, mask, cache), prompts)
        if penalties[0]:
            logits_BV = _penalized(logits_BV, penalties, rows, written)
        next_B = logits_BV.argmax(-1)
        tokens = next_B.tolist()
        for row in unfinished:
            written[row].append(tokens[row])
        unfinished = [row for row in unfinished if not ending.is_completed(written[row])]
        if not engine.any_rank(bool(unfinished)):
            break
        token_ids = next_B[:, None]
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
    return [ending.cut(ids) for ids in written]


def _penalized(
    logits_BV: Tensor,
    penalties: Sequence[LogitsProcessorList],
    rows: Sequence[Sequence[int]],
    written: Sequence[Sequence[int]],
) -> Tensor:
    """Each row by itself, without its padding."""
    changed = []
    for logits_V, penalty, row, ids in zip(logits_BV, penalties, rows, written, strict=True):
        seen = torch.tensor([[*row, *ids]], device=logits_V.device)
        changed.append(penalty(seen, logits_V[None]))
    return torch.cat(changed)
