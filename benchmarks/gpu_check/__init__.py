"""The check of a GPU: ``python -m benchmarks.gpu_check``, or ``make gpu-check``.

Each part is a process with a time limit (``runner``), so that a crash, an out-of-memory error or a
hang of one part does not end the others. ``part`` is the program of that process. ``sizes`` has the
sizes on a GPU, and small ones for the same code without a GPU. ``report`` renders the results.
"""
