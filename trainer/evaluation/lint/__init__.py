"""Check instructions in words against rules of good prompts. No torch.

1. ``instructions``: a run file -> ``Instruction``, with the ``TaskWords`` of its task
2. ``text``: an instruction -> ``Sentence``, with its words and their places
3. ``words``, ``requests``: what the rules look for
4. ``rules``, in ``structure``, ``wording``, ``demands`` and ``answers``: sentences, ``TaskWords``
   -> ``Finding`` (``finding``), each with a rewrite
5. ``rewrites``: findings -> texts that ``trainer.commands.lint`` scores
6. ``results``: findings and effects, as in ``lint --json``
"""
