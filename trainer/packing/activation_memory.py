"""Activation memory of a packed batch, and the token budget that follows. Imports no torch.

Frozen linear layers save no inputs for backward. Autograd keeps the inputs of norms and activations
and the queries, keys and values. The constants are from counts of saved tensors for each model
family (``trainer.training.saved_tensors``); a test compares estimates with counts. Bytes are per
token of a packed batch unless noted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

#: ``gradient_checkpointing: auto`` recomputes layers if packed batches of this many tokens do not
#: fit otherwise.
WORTHWHILE_TOKENS = 2048
#: On CPU: below this hidden size an integer product saves less than quantizing its operands costs.
INT8_MATMUL_MIN_HIDDEN = 512
#: Maximum tokens on a CPU, whose caches are small.
CPU_TOKENS = 1536
#: Minimum tokens, even if memory is short; a longer row gets a separate packed batch.
LEAST_TOKENS = 256
#: Share of the free memory that activations may take; the rest is a reserve.
USABLE_SHARE = 0.8
#: Mean padding in buckets of attention, whose rows have at least 0.7 of the longest length.
BUCKET_PADDING = 1.15
#: Bytes of the fp32 logits of one slice of the vocabulary, and its fewest columns; narrower ones
#: make the products slow.
LOGITS_BYTES = 64 << 20
MIN_COLUMNS = 1024
#: Elements of the smallest matrix that ``float_matmul`` multiplies with oneDNN: a slice of a head.
ONEDNN_MIN_ELEMENTS = 1 << 22
#: Most columns of a slice on a CPU: its logits stay in the cache.
CPU_COLUMNS = 8192
#: Number of slices of logits that exist at a time: products, fp32 copies, probabilities.
LOGITS_COPIES = 4
#: Token limit of a generation batch in multiples of a packed batch's, because generation keeps no
#: activations, only keys and values.
GENERATION_BATCHES = 4
#: Factor for small tensors of some families, such as clipped queries.
MARGIN = 1.05
#: Shares of the budget that the first steps use on a GPU, while its peak is measured.
RAMP = (0.25, 0.5)


def logit_columns(labels: int, on_cpu: bool) -> int:
    """Columns of a slice of logits of so many labels.

    On a CPU a power of two, since products there may need memory for every combination of sizes.
    """
    columns = LOGITS_BYTES // (4 * max(1, labels))
    if on_cpu:
        columns = min(CPU_COLUMNS, 1 << max(0, columns.bit_length() - 1))
    return max(MIN_COLUMNS, columns)


@dataclass(frozen=True)
class LayerSizes:
    """Sizes of a model that determine how much it saves for backward.

    Attributes:
        query_width, key_width: number of heads times head size, of queries and of keys.
        mlp_width: of one expert in a mixture of experts.
        mlp_tensors: saved tensors of that width: 1 for an activation, 2 for a gated one, 3 if it is
            not fused (``trainer.model.layers.fused_ops``).
        norm_inputs: number of norms of hidden size that save their input.
        wide_norms: norms save fp32, also if the compute type is bfloat16.
        layer_norm: LayerNorm instead of RMSNorm; queries and keys have no norms.
        query_norms: queries and keys have norms, or their inputs are saved for other reasons.
        experts_per_token: chosen for a token; 0 without experts.
        shared_width: width of the MLPs beside the experts, which compute all tokens.
        keeps_scores: attention saves its scores (capped, or with sinks).
        recurrent: fp32 elements per token that a recurrent layer saves, in transformers' reference
            implementation.
        recurrent_work: fp32 elements per token of its largest temporary tensor.
        cached_width: elements that the cache of one layer has for a token; 0: a key and a value of
            ``key_width``.
        limits_last_mlp: the last layer's MLP computes only the positions that predict a label
            (``trainer.model.layers.end_layers``).
        limits_ends: the same for the last layer's queries, and the first layer's queries, keys and
            values have a backward for prompts only.
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
    query_norms: bool = True
    experts_per_token: int = 0
    shared_width: int = 0
    keeps_scores: bool = False
    recurrent: int = 0
    recurrent_work: int = 0
    cached_width: int = 0
    limits_last_mlp: bool = False
    limits_ends: bool = False

    @property
    def mlp(self) -> int:
        """Elements per token of one tensor inside the MLP."""
        return self.mlp_width * max(1, self.experts_per_token) + self.shared_width


@dataclass(frozen=True)
class RowSizes:
    """Sizes of rows in the buckets of attention.

    Attributes:
        keys_per_token: keys gathered per token: its own, and its share of the row's prompt.
        keys_per_query: keys with which each query is compared.
        copied: attention saves the tensors of its buckets, not only the packed ones.
        own_masks: every layer saves a mask of its own, as for padded rows.
        padding: computed tokens per token of a packed batch; above 1 if rows are padded.
    """

    keys_per_token: float = 1.0
    keys_per_query: float = 0.0
    copied: bool = True
    own_masks: bool = False
    padding: float = 1.0


def row_sizes(
    lengths: Sequence[int], num_virtual: int, packed: bool = True, copied: bool = True
) -> RowSizes:
    """Return the sizes of rows of these lengths after a prompt of ``num_virtual`` tokens."""
    total = sum(lengths)
    if not total:
        return RowSizes()
    if not packed:
        longest = max(lengths) + num_virtual
        padding = longest * len(lengths) / total
        return RowSizes(1.0, longest, own_masks=True, padding=padding)
    keys_per_query = sum(n * (n * BUCKET_PADDING + num_virtual) for n in lengths) / total
    keys_per_token = BUCKET_PADDING + num_virtual * len(lengths) / total
    return RowSizes(keys_per_token, keys_per_query, copied)


@dataclass(frozen=True)
class BatchMemory:
    """Activation memory of packed batches.

    Attributes:
        itemsize: bytes per element of the compute type.
        logits_bytes: bytes of one slice of logits.
        margin: factor on what a layer saves.
    """

    sizes: LayerSizes
    rows: RowSizes
    itemsize: int
    logits_bytes: int
    margin: float = MARGIN

    def layer(self) -> float:
        """Return the bytes that one layer saves."""
        s, item = self.sizes, self.itemsize
        norms = s.norm_inputs * s.hidden
        if s.query_norms and not s.layer_norm:
            norms += s.query_width + s.key_width
        norms *= 4 if s.wide_norms else item
        return self.margin * (norms + self._attention() + 4 * s.recurrent) + self._mlp()

    def _mlp(self) -> float:
        s, item = self.sizes, self.itemsize
        routed = s.experts_per_token * (item * s.hidden + 32)
        return self.margin * (item * s.mlp_tensors * s.mlp + routed)

    def _attention(self) -> float:
        s, item = self.sizes, self.itemsize
        if not self.rows.copied and not s.keeps_scores:
            return item * 2 * s.key_width + self._queries()
        # Every row of a bucket has a copy of the keys and values of its prompt, not of the queries.
        # They are repeated for each query head.
        return item * 2 * s.query_width * self.rows.keys_per_token + self._queries()

    def _queries(self) -> float:
        """Bytes of the queries, their outputs, and what belongs to a query and its keys."""
        s, keys, item = self.sizes, self.rows.keys_per_query, self.itemsize
        if s.keeps_scores:
            of_keys = keys * (s.heads * (item + 4 + item % 4) + 1)
        else:  # mask and log-sum-exp
            of_keys = item * keys * self.rows.own_masks + 4 * s.heads
        padding = BUCKET_PADDING if self.rows.copied or s.keeps_scores else 1.0
        return item * 2 * padding * s.query_width + of_keys

    def saved(self, checkpointing: bool, unread: float = 0.0) -> float:
        """Return the bytes that the whole model saves from forward to backward.

        Args:
            unread: share of the positions that predict no label.
        """
        s = self.sizes
        layer = s.hidden * self.itemsize if checkpointing else self.layer()
        last = layer if checkpointing else self._last_layer(unread)
        # The norm after the layers, gradients at labels (of one token in 8), rotary embeddings,
        # indices of buckets, and their mask, which layers share.
        ends = 4 * (1.125 * s.hidden + 2 * s.query_width / s.heads) + 32
        if self.rows.copied and not (self.rows.own_masks or s.keeps_scores):
            ends += self.itemsize * self.rows.keys_per_query
        return self.rows.padding * ((s.layers - 1) * layer + last + ends)

    def peak(self, checkpointing: bool, unread: float = 0.0) -> float:
        """Return the peak: all saved bytes, and the buffers of one layer.

        It is reached in the last layer or, if that computes fewer positions, in the one before,
        when the bytes of the last one are free again.
        """
        s = self.sizes
        losses = 12 * s.hidden
        before = max(self.at_work(), losses)
        last = max(self.at_work(unread), losses * (1 - unread))
        freed = self._last_layer(unread)
        if checkpointing:  # the layer at work is recomputed
            last, before, freed = last + freed, before + self.layer(), s.hidden * self.itemsize
        at_peak = max(last, before - freed)
        return self.saved(checkpointing, unread) + self.rows.padding * at_peak

    def _last_layer(self, unread: float) -> float:
        s = self.sizes
        skipped = self._mlp() if s.limits_last_mlp else 0.0
        if s.limits_ends:
            skipped += self.margin * self._queries()
        return self.layer() - unread * skipped

    def at_work(self, unread: float = 0.0) -> float:
        """Return the bytes of the buffers of one layer, whose MLP skips a share of positions."""
        s = self.sizes
        read = 1 - unread if s.limits_last_mlp else 1
        # Of experts: inputs and outputs, sorted by expert and in the order of tokens.
        routed = 4 * self.itemsize * s.hidden * s.experts_per_token * read
        # Attention and MLP: queries, keys and values with gradients; at most three of MLP width.
        attention = 2 * (s.query_width + 2 * s.key_width)
        inner = max(attention, min(3, 1 + s.mlp_tensors) * s.mlp * read)
        return max(4 * (3 * s.hidden + inner) + routed, 4 * s.recurrent_work)

    def cached(self) -> int:
        """Return the bytes of a token in a cache."""
        width = self.sizes.cached_width or 2 * self.sizes.key_width
        return self.sizes.layers * width * self.itemsize

    def batch_bytes(self, tokens: int, checkpointing: bool) -> int:
        """Return the peak bytes of a packed batch of ``tokens`` tokens."""
        return int(tokens * self.peak(checkpointing)) + LOGITS_COPIES * self.logits_bytes

    def tokens(self, room: int, checkpointing: bool) -> int:
        """Return the most tokens that fit in ``room`` bytes, at least ``LEAST_TOKENS``."""
        fitting = (room - LOGITS_COPIES * self.logits_bytes) / self.peak(checkpointing)
        return max(LEAST_TOKENS, int(fitting))


@dataclass
class TokenBudget:
    """Maximum tokens of one packed batch, equal on all ranks; shrinks when memory runs short.

    Attributes:
        checkpointing: layers are recomputed in backward.
        expected_bytes: activations of a packed batch of ``tokens`` tokens.
        room: bytes available for activations.
        ramp: shares of ``tokens`` that the next steps use.
        cached_bytes, read_bytes: of a token in a batch of generation: its keys and values, and the
            buffers of one layer that reads it.
    """

    tokens: int
    checkpointing: bool = False
    expected_bytes: int = 0
    room: int = 0
    ramp: list[float] = field(default_factory=list)
    cached_bytes: float = 0.0
    read_bytes: float = 0.0

    def generation_tokens(self, spare: float = 1.0) -> int:
        """Return the maximum tokens of a batch of generation: prompt, input and answer of all rows.

        Args:
            spare: size of the cache's buffers in multiples of the tokens in it.
        """
        most, each = GENERATION_BATCHES * self.tokens, spare * self.cached_bytes + self.read_bytes
        return min(most, int(self.room / each)) if each else most

    @property
    def now(self) -> int:
        """Maximum tokens of a packed batch in the next step."""
        if not self.ramp:
            return self.tokens
        return max(min(self.tokens, LEAST_TOKENS), int(self.tokens * self.ramp[0]))

    def confirm(self, peak_bytes: int, tokens: int) -> bool:
        """End a step of the ramp; shrink the budget if the step's peak requires it.

        Args:
            peak_bytes: activations in the step, on the rank that used the most per token.
            tokens: tokens of that rank's longest packed batch.

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
        """Halve the budget, because a packed batch did not fit, and end the ramp."""
        self.tokens = max(1, self.now // 2)
        self.ramp = []

    @property
    def description(self) -> str:
        """One line for the log."""
        return (
            f"packed batches of up to {self.tokens:,} tokens, activations "
            f"{self.expected_bytes / 1e9:.2g} GB of {self.room / 1e9:.2g} GB free; "
            f"gradient checkpointing {'on' if self.checkpointing else 'off'}"
        )


def choose_budget(
    memory: BatchMemory,
    room: int,
    step_tokens: int,
    *,
    tokens: int | None = None,
    checkpointing: bool | None = None,
    most: int | None = None,
    ramp: Sequence[float] = (),
) -> TokenBudget:
    """Choose the longest packed batches that fit in memory and that a step needs.

    Args:
        room: bytes for activations on a rank's device.
        step_tokens: tokens that a rank reads in a step.
        tokens: ``training.micro_batch_tokens``; None for auto.
        checkpointing: ``engine.gradient_checkpointing``; None for auto: on if
            ``WORTHWHILE_TOKENS`` do not fit without.
        most: maximum beyond which longer packed batches are not faster.
        ramp: shares of the budget for the first steps, to confirm it; not used with ``tokens``.
    """
    goal = tokens or min(step_tokens, most or step_tokens)
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
        memory.cached(),
        memory.at_work(),
    )
