"""The program of ``promptshard evaluate``: compare prompts, baselines and adapters on equal rows.

1. ``options``: command line -> ``Options``; imports no torch. ``early_fit`` refuses too many
   examples in context before any rank starts
2. ``rows``: ``EvalSet`` of a task -> the same rows with examples in context, or changed
3. ``arms``: run, ``Options`` -> one ``Arm`` (``arm``) per prompt, baseline and adapter
4. ``store``: files of predictions, one record per row, which an interrupted evaluation continues
   ``similar_rows``: texts -> train rows with similar hidden states
5. ``scoring_pass``, ``scoring``: ``Arm`` -> records of all its rows
6. ``results``: records, ``costs`` -> ``evaluation.json`` and the table of every task
"""
