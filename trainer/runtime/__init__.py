"""Errors, console, processes and files, for all other folders. Imports no torch and no mlflow.

In the order in which a process uses them:

1. ``bootstrap``: run a module with a clean import path. ``process``: end with the parent process.
   ``limits``: cores and memory in a container.
2. ``rank_program``: run a rank and turn its exceptions (``errors.BadInput``, ``errors.PortTaken``)
   into exit codes. ``stdio``: redirect library output to the rank's log. ``stop_signals``: stop
   when loading, or after the current step.
3. ``console``: messages, progress and tables. ``step_line``: the newest training step. ``phases``:
   a running ``Phase``, seconds by phase. ``redact``: hide credentials and escape control
   characters.
4. ``atomic_io``, ``json_file``: write files atomically, read untrusted JSON. ``cache_dir``,
   ``log_folder``, ``git_revision``: location of caches and of logs, revision of the code.
   ``freed_memory``: return freed memory to the system.
"""
