"""``promptshard inspect``: measure the errors of int8 weights and their effect on the loss.

1. ``weights``: measure the error of every weight that a run stores in int8 -> ``WeightError``
2. ``losses``: score a sample of validation rows with the original and the int8 base model
3. ``findings``: report both as JSON, warnings and tables
"""
