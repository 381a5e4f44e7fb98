"""Prompts: initialization, encoders, and the bank that trains them together.

1. ``config/encoders.py`` registers each encoder: settings, defaults, checks and builder.
2. ``initializers.py``, ``init_search.py``: setting ``init`` -> initial values, one ``Tensor`` per
   prompt.
3. ``parameter_groups.py``: settings and initial values -> ``PromptEncoder``, ``ParameterGroup``.
4. ``encoders.py``, ``text_encoder.py``, ``extended/``: ``PromptEncoder`` -> values, a ``Tensor``.
5. ``bank.py``: all encoders -> one ``SoftPrompt`` each (``soft_prompt.py``), with noise and dropout
   in training (``regularization.py``); their gradients -> one optimizer step per prompt.
   ``resume_check.py`` compares the prompts with those of a checkpoint.
6. ``peft_adapter.py``: ``SoftPrompt`` <-> PEFT adapter; ``saved_prompts.py`` checks adapters that
   initialize other prompts, without torch.
7. ``formats/``: ``SoftPrompt`` -> files for vLLM, SGLang, TensorRT-LLM, llama.cpp, NumPy and PEFT.
"""
