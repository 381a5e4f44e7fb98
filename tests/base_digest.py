"""A digest of the base that a rank holds, to prove that training does not change it."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from trainer.distributed.zero3_sharder import resident_tensors


def base_digest(base: nn.Module) -> str:
    """SHA-256 over all tensors of the base that stay on this rank."""
    digest = hashlib.sha256()
    for tensor in resident_tensors(base):
        digest.update(tensor.detach().reshape(-1).cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
