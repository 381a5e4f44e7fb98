"""Scores of prompts and baselines on validation rows."""
