"""Frozen layers: int8 linear layers, embedding, head, experts, fused operations."""
