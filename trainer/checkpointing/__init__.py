"""Checkpoints, resume and the lock of the output folder."""
