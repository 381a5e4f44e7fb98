"""Score prompts and baselines on validation rows.

1. ``scoring``: a ``Request`` (rows, prompt, teacher) becomes packed rows; its result is ``Scored``
2. ``evaluator``: ``Evaluator.score`` runs the packed rows through the base model -> ``Scored``; for
   metrics on generated text it uses ``generation`` with ``stop_criteria`` and ``token_sampling``
3. ``metrics``: compute scores of predictions; ``execution`` runs generated code in
   ``code_sandbox``; ``pass_at_k`` estimates pass@k from several answers per row
4. ``statistics``: standard errors, intervals and paired tests; ``score_format``: numbers as text
5. ``baselines``: all baselines of a run -> scores by task; ``baseline_cache`` stores likelihoods
   under the base model alone for later runs
6. ``prediction_records``: ``Scored`` -> one record per row, written to ``predictions/``;
   ``prediction_files`` names and reads these files
7. ``selection``: the best prompt of a task
8. ``inspection``: measurements of single virtual tokens
"""
