"""Rows -> packed batches."""
