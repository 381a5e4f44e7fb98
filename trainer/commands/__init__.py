"""Programs of the commands that ``launch`` starts. One file or package per command.

- ``prepare``: convert a base model to int8
- ``generate``: generate text with a trained prompt
- ``export``: turn a task description into a prompt with a trained text encoder;
  ``export_prompt``: write a trained prompt for another program
- ``evaluate``: compare trained prompts with their alternatives
- ``lint``: score the rewrites of instructions
- ``plan``: compute memory, speed and hours of a run
- ``inspect``: measure the errors of int8 weights and their effect on validation losses
- ``inspect_prompts``: measure what the virtual tokens of trained prompts do
- ``preview``: print the first rows as the base will read them
- ``serve``: answer over HTTP, with OpenAI's API
- ``sync``: upload metrics and artifacts to MLflow, after or during training;
  ``mlflow_model``: load a registered prompt for MLflow

Training itself is ``trainer.__main__``.
"""
