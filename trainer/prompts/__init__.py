"""Prompts: initialization, encoders, and the bank that trains them together.

1. ``config/encoders.py`` registers each encoder: settings, defaults, checks and builder.
2. ``initializers.py``, ``init_search.py``: ``init`` -> initial values, a tensor per prompt.
3. ``parameter_groups.py``: settings, initial values -> ``PromptEncoder`` and ``ParameterGroup``.
4. ``encoders.py``, ``text_encoder.py``, ``extended/``: ``PromptEncoder`` -> values, a tensor.
5. ``bank.py``: all encoders -> a ``SoftPrompt`` each (``soft_prompt.py``), with noise and dropout
   in training (``regularization.py``); gradients of these -> one optimizer step per prompt.
6. ``peft_adapter.py``: ``SoftPrompt`` <-> PEFT adapter; ``saved_prompts.py`` checks adapters that
   initialize other prompts, without torch.
"""
