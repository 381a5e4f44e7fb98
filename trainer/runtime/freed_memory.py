"""Return freed memory to the system. Standard library only."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


@contextmanager
def return_freed_memory(*, reuse: bool = True) -> Iterator[None]:
    """Have glibc return every freed allocation of at least 1 MiB to the system immediately.

    By default glibc raises its mmap threshold and keeps such memory for reuse, so freed read
    buffers would stay resident. Training is faster with reuse: the thresholds are raised at the
    end. A threshold in the environment (``MALLOC_MMAP_THRESHOLD_``) is never changed.

    Args:
        reuse: False keeps a low threshold. Reuse doubles the memory of activations, because glibc
            (2.36) cannot place an aligned allocation into a hole of its size.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        yield
        return
    if "MALLOC_MMAP_THRESHOLD_" in os.environ:
        yield
        return
    mallopt(M_MMAP_THRESHOLD, 1 << 20)
    try:
        yield
    finally:
        if reuse:  # the upper limits of glibc's own adjustment: see mallopt(3)
            mallopt(M_MMAP_THRESHOLD, 32 << 20)
            mallopt(M_TRIM_THRESHOLD, 64 << 20)
        else:
            mallopt(M_MMAP_THRESHOLD, 128 << 10)
            mallopt(M_TRIM_THRESHOLD, 128 << 10)
