"""The command line: check a run file and start the processes of its run. Imports no torch."""

__version__ = "0.1.0"
