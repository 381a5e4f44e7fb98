"""Run file -> processes. Nothing in here imports torch."""

__version__ = "0.1.0"
