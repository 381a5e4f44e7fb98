"""Check instructions in words against rules of good prompts. No torch.

1. ``text``: an instruction -> ``Sentence``, with its words and their places
2. ``words``: the words and phrases that the rules look for
3. ``rules``: sentences and the task's ``TaskWords`` -> ``Finding``, each with a rewrite
"""
