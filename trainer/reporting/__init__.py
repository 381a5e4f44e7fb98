"""Results of a run for people and for other programs.

1. ``run_description`` writes ``run.yaml``, ``environment.json`` and ``datasets.json`` at the start,
   and measures memory, traffic and speed at the end -> fields of ``RunSummary``
2. ``run_results`` writes adapters and builds the ``RunSummary``; ``comparison`` adds the paired
   ``Comparison`` with the best baseline, and ``overfitting`` the signs of ``Overfitting``
3. ``summary`` defines ``RunSummary``, and saves and loads it as ``summary.json``
4. ``result_table`` makes a ``TaskTable`` of every task: rows, order, columns and formatted numbers;
   ``verdict`` describes its comparison in words; ``costs`` the cost of the run
5. ``terminal_table``, ``html`` and ``mlflow_note`` render the tables: terminal, ``report.html`` and
   ``FinalResults`` for MLflow
6. ``model_card`` writes the ``README.md`` of every adapter, as the Hugging Face hub reads it
7. ``run_end`` waits for the upload to MLflow, or writes the summary of a failed run
"""
