"""Learning on a real language model: SmolLM2-135M-Instruct and patients' reviews of drugs.

1. ``files``: packages -> base model in 16 bits, and the rows of every cell.
2. ``plan``: the cells (arm, task, rows, steps, seed, learning rate), and the order to run them in.
3. ``own_runs`` and ``packed_peft``: run a cell, with ``promptshard train`` or with PEFT.
4. ``cells``: keeps the results; a repeated command runs the missing ones only.
5. ``arm_results``, ``tables``: results -> intervals and differences -> table, plot and JSON.
"""
