"""What a run's parts are like, from the outside: ``promptshard inspect``."""
