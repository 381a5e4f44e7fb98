"""Errors of libraries that read the files of a model. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from trainer.runtime.errors import BadInput


@contextmanager
def library_errors(subject: str) -> Iterator[None]:
    """Convert any exception of a library that reads files to BadInput, except stops by the user.

    Panics of tokenizers do not derive from ``Exception``.
    """
    try:
        yield
    except (BadInput, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        text = " ".join(str(error).split())
        if "custom code" in text:
            raise BadInput(
                f"{subject}: needs custom code, which is never executed; use a model that "
                "transformers supports"
            ) from None
        raise BadInput(
            f"{subject}: transformers cannot read it: {text[:300]} ({type(error).__name__}); copy "
            "or download it again, or use a model that this version of transformers supports"
        ) from None
