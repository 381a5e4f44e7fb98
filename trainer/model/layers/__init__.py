"""Frozen layers that replace those of transformers.

1. ``embedding``: token ids -> embeddings [..., H]; each rank holds a block of rows and exchanges
   rows through a ``row_exchange.RowExchange``.
2. ``linear`` and ``moe``: linear layers and stacked experts with int8 rows (``quantization``).
   Experts multiply with the dequantized weight. Linear layers call a product function of
   ``int8_matmul`` or ``bitsandbytes_matmul``, which ``matmul_selection`` selects at load.
3. ``fused_ops``: norms, gated activations and rotary embeddings that save little for backward.
   ``compilation`` compiles their loops and those of ``int8_matmul`` where that is faster.
   ``end_layers`` limits the last layer to positions that the head reads, and the backward of the
   first layer's queries, keys and values to prompts.
4. ``lm_head``: hidden states [N, H] -> logits, or ``LabelLosses`` computed in slices of the
   vocabulary (``vocab_parallel``): ``fused_cross_entropy``, or ``fused_kl`` for distillation.
"""
