"""Training of a run's prompts, step by step.

1. ``task_loading``: rows of all tasks -> ``TaskData``.
2. ``initial_bank``, ``init_scoring``: initial prompts -> ``Bank``.
3. ``loop``: the order of the events of a run; ``baseline_scoring`` runs before the first step.
4. ``step``: packed batches -> ``StepResult``: loss and gradient of each prompt;
   ``memory_monitor`` lowers the token budget, ``skipped_updates`` counts non-finite updates.
5. ``prompt_optimizer``, ``optimizers``, ``lr_schedules``: gradients -> one update of each prompt.
6. ``accounting``: time, tokens and traffic of the step -> ``StepReport``.
7. ``validation``, ``early_stopping``, ``halving``: scores -> ``Metrics``, and prompts to stop;
   ``validation_report`` prints them.
8. ``callbacks``: reports and metrics -> console; further ones in ``tracking``, ``checkpointing``.

``progress`` is the state that checkpoints hold; ``profiler`` records single steps.
"""
