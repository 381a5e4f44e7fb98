"""Save a run atomically and resume it. Imports no torch, for ``launch``.

In the order in which a run uses them:

1. ``run_lock``: ``acquire`` makes this process the only writer of the output folder (``Lock``).
2. ``resume``: ``run_identity`` collects everything that must match; ``find_checkpoint`` returns the
   ``SavedCheckpoint`` to resume from, or None; ``finished_summary`` recognizes a finished run.
   ``checkpoint.newest`` reads it, ``saved_state`` validates its JSON.
3. ``output_folder``: ``archive_earlier_run`` for ``--fresh``; ``OutputFolder`` detects during
   training that the folder was moved or deleted, and writes it again.
4. ``checkpoint_callback``: between two steps, ``resume.take_run_snapshot`` copies the state
   (``Snapshot``), and ``state_tensors`` separates tensors from JSON. ``async_writer`` writes it in
   a background thread with ``checkpoint.write``, which keeps the newest checkpoints.

``checkpoint_names`` lists checkpoints by name, without reading them.
"""
