"""Packing of rows into batches without padding.

1. ``batch_source``: samples the rows of each prompt's next update -> ``list[PackedRow]``.
2. ``planning``: assigns rows to ranks and batches -> ``plan[rank][batch]: list[PackedRow]``.
3. ``token_tree``: text that the candidates or branches of a row share occurs once -> ``TokenTree``.
4. ``packed_batch``: lays rows end to end after their prompts -> ``PackedBatch``.

``activation_memory`` estimates the memory of a packed batch -> ``TokenBudget``, its maximum length;
``run_budget`` takes its arguments from the run file. ``packed_row`` has the rows of 1 to 4.
"""
