"""``promptshard inspect``: measure the errors of int8 weights and their effect on the loss.

1. ``weights``: read every weight that a run keeps in int8 -> ``WeightError``
2. ``losses``: score a sample of validation rows with the original and the int8 base model
3. ``findings``: both as JSON, as warnings and as tables
"""
