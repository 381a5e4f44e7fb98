"""The program of ``promptshard lint --measure``: score the rewrites of instructions.

1. ``options``: command line -> ``Options``; imports no torch
2. ``selection``: run file, ``Options`` -> instructions with their findings; imports no torch
3. ``texts``: instructions -> one ``Arm`` of ``promptshard evaluate`` per distinct text
4. ``program``: arms -> scores of all texts in one pass -> ``lint.json``
5. ``effects``: scores -> paired differences to the original
"""
