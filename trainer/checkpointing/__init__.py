"""Save a run atomically and resume it.

1. ``run_lock``: ``acquire`` makes this process the only writer of the output folder (``Lock``).
2. ``resume``: ``run_identity`` collects everything that must match; ``find_checkpoint`` returns the
   ``SavedCheckpoint`` to resume from, or None. ``checkpoint.newest`` reads it, and ``saved_state``
   validates its JSON.
3. ``output_folder``: ``archive_earlier_run`` for ``--fresh``; ``OutputFolder`` detects a moved or
   deleted folder during training and writes it again.
4. ``checkpoint_callback``: between two steps, ``resume.take_run_snapshot`` copies the state
   (``Snapshot``), and ``state_tensors`` separates tensors from JSON. ``async_writer`` writes it in
   a background thread with ``checkpoint.write``, which keeps the newest checkpoints.

``checkpoint_names`` lists checkpoints by name, without reading them. ``launch`` imports it and
``run_lock``, which therefore import no torch.
"""
