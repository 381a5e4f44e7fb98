"""What a run needs, computed before it starts: memory, FLOPs, gathered bytes, hours.

1. ``base_headers.open_base_shape``: headers of the weight files -> ``BaseShape``, the sizes of the
   base as it is stored on ranks.
2. ``run_needs.needs_of_tasks``: run file, rows, ``BaseShape`` -> ``RunNeeds``.
3. ``step_work.step_work``: rows of one update -> ``BatchWork`` of every packed batch of every rank.
4. ``step_cost.step_cost``: ``BatchWork`` -> ``StepCost``: FLOPs, gathered bytes, saved bytes.
5. ``hardware.find_device``: name or numbers -> ``Device``, with the fabrics between devices.
6. ``run_plan.plan_run``: all of these -> ``RunPlan``, one ``Option`` per shard group;
   ``run_time.phase_seconds`` has the time of each phase.

The shard group, the parameters that stay gathered and the length of packed batches are chosen by
the functions that a run calls (``placement.place``, ``run_budget.run_budget``). Imports no torch.
"""
