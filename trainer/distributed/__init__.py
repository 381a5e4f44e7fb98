"""Ranks: DeepSpeed, collectives, watchdog, placement of the base."""
