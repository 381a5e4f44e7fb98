"""Useful tokens per second and what they cost, beside the trainers that people use now."""
