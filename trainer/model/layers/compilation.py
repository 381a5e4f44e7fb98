"""Compile functions of tensors into one loop over memory, where that is faster."""

from __future__ import annotations

import os
import shlex
import sysconfig
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

#: Up to this number of elements, a call of the compiled loop takes longer than separate operations
#: (measured on a CPU: 15 to 25 us for the call alone), as for the few rows of a decode step.
MAX_SEPARATE = 1 << 15


def why_not_on_cpu() -> str | None:
    """Return what keeps torch from compiling for this CPU, and the remedy; None if nothing does.

    Without this check, a run would fail at its first step.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler
    from torch._inductor.runtime.cache_dir_utils import cache_dir
    from torch.utils.cpp_extension import TORCH_LIB_PATH

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, OSError):  # OSError: CXX is empty or a folder
        compiler = os.environ.get("CXX")
        remedy = "install g++" if compiler is None else f"CXX={compiler} cannot be run: unset it"
        return f"without a C++ compiler ({remedy})"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "without the headers of Python (install python3-dev)"
    # torch 2.13 passes this path to the linker without quotes (pytorch pull request 191010).
    if shlex.split(TORCH_LIB_PATH) != [TORCH_LIB_PATH]:
        return (
            f"with torch in {TORCH_LIB_PATH}, since torch.compile does not work in a folder with "
            "spaces or quotes in its name (install into another folder)"
        )
    folder = cache_dir()
    if shlex.split(folder) != [folder]:
        problem = "has spaces or quotes in its name"
    elif not os.access(folder, os.W_OK | os.X_OK):
        problem = "is not writable"
    elif os.statvfs(folder).f_flag & os.ST_NOEXEC:
        problem = "is mounted noexec"
    else:
        return None
    return (
        f"with the cache of torch.compile in {folder}, which {problem} (set "
        "TORCHINDUCTOR_CACHE_DIR to another folder)"
    )


def fused_loop(function: Callable[..., Any], x: Tensor) -> Callable[..., Any]:
    """Return ``function``, compiled if ``x``, its largest input, has many elements."""
    return function if x.numel() <= MAX_SEPARATE else compiled(function)


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function on its first use, once for all shapes.

    Without fusion, quantizing the operands takes as long as the integer product itself.
    """
    return torch.compile(function, dynamic=True)
