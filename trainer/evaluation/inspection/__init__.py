"""Measurements of ``promptshard inspect RUN_DIR``: what a prompt's virtual tokens do.

1. ``embedding_space``: virtual tokens -> nearest tokens of the vocabulary, norms, distances
2. ``leave_one_out``: prompt -> shorter prompts -> changes of the loss, and which tokens to drop
3. ``sensitivity``: prompts, rows -> attention on each virtual token, and gradient times input
4. ``elicitation``: hidden states of virtual tokens -> text that the base writes about them
"""
