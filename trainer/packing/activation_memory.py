"""Activation memory of a packed batch, and the token budget that follows. Imports no torch.

Frozen linear layers save no input, so what autograd keeps of a layer are the inputs of its norms
and activations, and queries, keys and values. The constants were found by counting saved tensors of
every family (``trainer.training.saved_tensors``); a test holds the estimate to what is counted.
Bytes are per token of a packed batch where nothing else is said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

#: Where packed batches of this many tokens do not fit, layers are recomputed.
WORTHWHILE_TOKENS = 2048
#: On CPU, where caches are small, packed batches are not made longer.
CPU_TOKENS = 1536
#: Whatever memory says, packed batches are not made shorter; a longer row goes alone.
LEAST_TOKENS = 256
#: Share of the free memory that activations may take; the rest is for what no model foresees.
USABLE_SHARE = 0.8
#: Buckets of attention hold rows down to 0.7 of their longest: what padding adds on average.
BUCKET_PADDING = 1.15
#: Slices of logits at work at a time: products, fp32 copies, shares.
LOGITS_COPIES = 4
#: What a family saves beside the rest, such as clipped queries.
MARGIN = 1.05
#: Shares of the budget that the first steps read on a GPU, while its peak is watched.
RAMP = (0.25, 0.5)


@dataclass(frozen=True)
class LayerSizes:
    """What of a model decides how much it saves.

    Attributes:
        query_width, key_width: heads times their size, of queries and of keys.
        mlp_width: of an expert, where there are some.
        mlp_tensors: of that width that are saved: 1 for an activation, 2 for a gated one, 3 where
            that is not in one pass (``trainer.model.layers.fused_ops``).
        norm_inputs: norms of hidden size that save their input,
        wide_norms: in fp32 whatever the compute type.
        layer_norm: queries and keys have no norms of their own, unlike with others.
        experts_per_token: 0 where there are none.
        keeps_scores: attention saves its scores (capped, or with sinks).
    """

    layers: int
    hidden: int
    heads: int
    query_width: int
    key_width: int
    mlp_width: int
    mlp_tensors: int = 2
    norm_inputs: int = 2
    wide_norms: bool = False
    layer_norm: bool = False
    experts_per_token: int = 0
    keeps_scores: bool = False

    @property
    def mlp(self) -> int:
        """Elements of one tensor between the two halves of the MLP."""
        return self.mlp_width * max(1, self.experts_per_token)


@dataclass(frozen=True)
class RowSizes:
    """How rows lie in attention's buckets.

    Attributes:
        keys_per_token: keys gathered for each token: its own, and its share of the row's prompt.
        keys_per_query: keys each query is compared with.
        copied: what buckets lay out is saved, not packed tensors alone.
        padding: tokens that are computed for each token of a packed batch, where rows are not
            packed.
    """

    keys_per_token: float = 1.0
    keys_per_query: float = 0.0
    copied: bool = True
    padding: float = 1.0


def row_sizes(
    lengths: Sequence[int], num_virtual: int, packed: bool = True, copied: bool = True
) -> RowSizes:
    """Of rows with these numbers of tokens behind a prompt of ``num_virtual`` tokens."""
    total = sum(lengths)
    if not total:
        return RowSizes()
    if not packed:
        longest = max(lengths) + num_virtual
        return RowSizes(1.0, longest, padding=longest * len(lengths) / total)
    keys_per_query = sum(n * (n * BUCKET_PADDING + num_virtual) for n in lengths) / total
    keys_per_token = BUCKET_PADDING + num_virtual * len(lengths) / total
    return RowSizes(keys_per_token, keys_per_query, copied)


@dataclass(frozen=True)
class BatchMemory:
    """What packed batches over one base take.

    Attributes:
        itemsize: bytes of the compute type.
        logits_bytes: of the slice of logits that is at work.
    """

    sizes: LayerSizes
    rows: RowSizes
    itemsize: int
    logits_bytes: int

    def layer(self) -> float:
        """Saved by one layer."""
        s, item = self.sizes, self.itemsize
        norms = s.norm_inputs * s.hidden
        if not s.layer_norm:
            norms += s.query_width + s.key_width
        norms *= 4 if s.wide_norms else item
        mlp = item * s.mlp_tensors * s.mlp
        routed = s.experts_per_token * (item * s.hidden + 32)
        return MARGIN * (norms + mlp + routed + self._attention())

    def _attention(self) -> float:
        s, keys, item = self.sizes, self.rows.keys_per_query, self.itemsize
        if not self.rows.copied and not s.keeps_scores:
            return item * 2 * (s.query_width + s.key_width) + 4 * s.heads  # and log-sum-exp
        # Queries and outputs as they come; every row of a bucket has its own copy of its prompt.
        queries = 2 * BUCKET_PADDING * s.query_width
        # Keys and values are repeated for each head of queries.
        gathered = 2 * s.query_width * self.rows.keys_per_token
        if not s.keeps_scores:
            return item * (queries + gathered + keys) + 4 * s.heads  # mask and log-sum-exp
        return item * (queries + gathered) + keys * (s.heads * (item + 4 + item % 4) + 1)

    def saved(self, checkpointing: bool) -> float:
        """Saved from forward to backward by the whole model."""
        s = self.sizes
        layer = s.hidden * self.itemsize if checkpointing else self.layer()
        # Norms behind the first and the last layer, rotations, places in buckets.
        ends = 4 * (2 * s.hidden + 2 * s.query_width / s.heads) + 32
        return self.rows.padding * (s.layers * layer + ends)

    def peak(self, checkpointing: bool) -> float:
        """The most there is at a time: what is saved, and the layer at work."""
        s = self.sizes
        at_work = 4 * (3 * s.hidden + s.query_width + 2 * s.key_width + 3 * s.mlp)
        losses = 12 * s.hidden
        again = self.layer() if checkpointing else 0
        return self.saved(checkpointing) + self.rows.padding * (again + max(at_work, losses))

    def batch_bytes(self, tokens: int, checkpointing: bool) -> int:
        """Bytes of a whole packed batch."""
        return int(tokens * self.peak(checkpointing)) + LOGITS_COPIES * self.logits_bytes

    def tokens(self, room: int, checkpointing: bool) -> int:
        """The longest packed batch that ``room`` bytes hold, at least ``LEAST_TOKENS``."""
        fitting = (room - LOGITS_COPIES * self.logits_bytes) / self.peak(checkpointing)
        return max(LEAST_TOKENS, int(fitting))


@dataclass
class TokenBudget:
    """Maximum tokens of one packed batch, equal on all ranks; shrinks when memory runs short.

    Attributes:
        tokens: what memory is taken to hold.
        checkpointing: layers are recomputed in backward.
        expected_bytes: of activations in a packed batch of that length.
        room: bytes that activations may take.
        ramp: shares of ``tokens`` that the next steps read.
    """

    tokens: int
    checkpointing: bool = False
    expected_bytes: int = 0
    room: int = 0
    ramp: list[float] = field(default_factory=list)

    @property
    def now(self) -> int:
        """Most tokens of a packed batch in the step that comes next."""
        if not self.ramp:
            return self.tokens
        return max(min(self.tokens, LEAST_TOKENS), int(self.tokens * self.ramp[0]))

    def confirm(self, peak_bytes: int, tokens: int) -> bool:
        """A step of the ramp is done: shrink to what its peak allows.

        Args:
            peak_bytes: of activations in that step, on the rank that took most of the room.
            tokens: of that rank's longest packed batch.

        Returns:
            Whether the budget shrank.
        """
        if not self.ramp:
            return False
        self.ramp.pop(0)
        allowed = max(LEAST_TOKENS, self.room * tokens // max(1, peak_bytes))
        shrinks = allowed < self.tokens
        if shrinks:
            self.tokens = allowed
            self.expected_bytes = self.room
        return shrinks

    def halve(self) -> None:
        """A packed batch did not fit."""
        self.tokens = max(1, self.now // 2)
        self.ramp = []

    @property
    def words(self) -> str:
        """For the log."""
        return (
            f"packed batches of up to {self.tokens:,} tokens, activations "
            f"{self.expected_bytes / 1e9:.2g} GB of {self.room / 1e9:.2g} GB free; "
            f"gradient checkpointing {'on' if self.checkpointing else 'off'}"
        )


def choose_budget(
    memory: BatchMemory,
    room: int,
    wanted: int,
    *,
    tokens: int | None = None,
    checkpointing: bool | None = None,
    most: int | None = None,
    ramp: Sequence[float] = (),
) -> TokenBudget:
    """As few, as full packed batches as memory allows.

    Args:
        room: bytes of a rank's device that activations may take.
        wanted: tokens that a rank reads in a step: no packed batch needs more.
        tokens: ``training.micro_batch_tokens``; None for auto.
        checkpointing: ``engine.gradient_checkpointing``; None for auto: where a batch that is
            worth its gathers does not fit otherwise.
        most: longer packed batches bring nothing.
        ramp: shares of the budget that the first steps read, to confirm it; not of the user's own.
    """
    goal = tokens or min(wanted, most or wanted)
    if checkpointing is None:
        needed = goal if tokens else min(goal, WORTHWHILE_TOKENS)
        checkpointing = memory.tokens(room, False) < needed
    chosen = tokens or min(goal, memory.tokens(room, checkpointing))
    return TokenBudget(
        chosen,
        checkpointing,
        memory.batch_bytes(chosen, checkpointing),
        room,
        [] if tokens else list(ramp),
    )
