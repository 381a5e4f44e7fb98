"""``promptshard predict``: rows in, one JSON line per row out.

1. ``plan``: options -> ``PredictionPlan``: prompts, rows and what the output depends on; no torch
2. ``output_file``: complete lines of an earlier start; appends lines in the order of the rows
3. ``program``: on all ranks: plan -> base -> blocks of predictions -> output file
"""
