"""Attention over packed batches.

1. ``interface``: segments of a packed batch -> ``Layout``, computed once. It registers
   ``packed_attention`` with transformers; ``family_overrides`` adapts the families that do not use
   transformers' attention interface.
2. ``bucket_layout``: segments -> ``Buckets`` of similar length; ``bucketed`` attends within them.
   ``indexing`` lays tokens out, also those of padded rows.
3. ``spans``: segments -> ``Spans``, for kernel calls without padding instead of buckets, on a CPU,
   where the first and the last layer compute less.
   ``cpu_kernels``: the kernels, and what is saved for backward.
4. ``flex``: segments -> ``FlexLayout``, for one FlexAttention kernel instead of buckets.
5. ``padded``: segments -> ``PaddedRows``, for families that do not support packed rows.
6. ``prefix_cache``: prompts of keys and values in the cache of a decoder. ``batch_cache``: rows
   that join and leave the cache of a running batch.
"""
