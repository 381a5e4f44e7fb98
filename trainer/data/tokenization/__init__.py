"""Rows -> token ids."""
