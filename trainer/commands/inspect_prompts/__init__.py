"""The program of ``promptshard inspect RUN_DIR``: what the virtual tokens of trained prompts do.

1. ``options``: command line -> ``Options``; imports no torch
2. ``subjects``: run, ``Options`` -> one ``Subject`` per prompt: its rows, controls and checkpoints
3. ``measurements``: ``Subject`` -> ``Measurements``, all prompts together
4. ``pruning``: losses without each virtual token -> shorter prompt -> adapter
5. ``results``: ``Measurements`` -> ``inspection.json``; ``table``: the same on the terminal
"""
