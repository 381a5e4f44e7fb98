"""Packing of training rows into batches without padding.

1. ``batch_source``: samples the rows of each prompt's next update -> ``list[PackedRow]``.
2. ``planning``: assigns rows to ranks and batches -> ``plan[rank][batch]: list[PackedRow]``.
3. ``packed_batch``: lays rows end to end after their prompts -> ``PackedBatch``.

``activation_memory`` estimates the memory of a packed batch -> ``TokenBudget``, its maximum length.
"""
