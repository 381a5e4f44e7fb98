"""Errors, console, processes and files: what every other folder needs."""
