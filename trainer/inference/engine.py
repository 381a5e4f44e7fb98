"""The engine of this process: one rank alone, or a rank that the launcher started."""

from __future__ import annotations

from torch import nn

from trainer.distributed.deepspeed_engine import Engine

#: Open engines of this process, which share one process group.
_open: list[Engine] = []
#: ``nn.functional.linear`` of the caller, which DeepSpeed replaces for the whole process.
_linear = nn.functional.linear


def open_engine(timeout_seconds: int) -> Engine:
    """Open the engine of this rank; without a launcher, of the only rank.

    Several engines may be open in one process; ``close_engine`` closes them.
    """
    global _linear
    if not _open:
        _linear = nn.functional.linear
    engine = Engine(timeout_seconds)
    _open.append(engine)
    return engine


def close_engine(engine: Engine) -> None:
    """Close an engine; the process group ends with the last one."""
    if engine in _open:
        _open.remove(engine)
        if not _open:
            engine.close()
            nn.functional.linear = _linear
