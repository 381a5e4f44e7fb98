"""Run a module so that files in the working directory cannot hide other modules.

    python trainer/runtime/bootstrap.py [OPTIONS] MODULE [ARGUMENT ...]

``python -m MODULE`` imports from the working directory first: a ``json.py`` or a folder ``trainer``
there replaces the real one silently. Therefore every process of this project is started with the
path of this file, which also sets PYTHONSAFEPATH for the processes that libraries start.

Until the import path is clean, import only modules that the interpreter has already loaded.
"""

import os
import sys

ARGUMENTS = "PROMPTSHARD_ARGUMENTS"
#: Characters of one variable, of at most 4 bytes each. Linux allows 128 KiB.
VARIABLE_LENGTH = 30_000
PARENT = "PROMPTSHARD_PARENT"
FILE = os.path.abspath(__file__)
PACKAGE = os.path.dirname(os.path.dirname(FILE))
ROOT = os.path.dirname(PACKAGE)


def command(module: str, *options: str, python: str | None = None) -> list[str]:
    """Return the command line that runs a module, to which its arguments can be appended."""
    return [python or sys.executable, FILE, *options, module]


def arguments_in_environment(arguments: list[str]) -> dict[str, str]:
    """Return the environment variables that ``--arguments-in-environment`` reads.

    All users can read the command line of a process; only its owner can read the environment.
    """
    import json

    text = json.dumps(arguments, ensure_ascii=False)
    starts = range(0, len(text), VARIABLE_LENGTH)
    return {
        _variable(number): text[start : start + VARIABLE_LENGTH]
        for number, start in enumerate(starts)
    }


def _variable(number: int) -> str:
    return f"{ARGUMENTS}_{number}" if number else ARGUMENTS


def _arguments_of_environment() -> list[str]:
    """Remove the variables of ``arguments_in_environment`` and return the arguments."""
    import json

    parts = [os.environ.pop(ARGUMENTS)]
    while (part := os.environ.pop(_variable(len(parts)), None)) is not None:
        parts.append(part)
    arguments: list[str] = json.loads("".join(parts))
    return arguments


def clean_path() -> None:
    """Remove the working directory and the folder of this file from the import path."""
    unsafe = {os.path.realpath(os.path.dirname(FILE)), _real(".")}
    unsafe.discard(os.path.realpath(ROOT))
    sys.path[:] = [entry for entry in sys.path if entry and _real(entry) not in unsafe]
    if os.path.realpath(ROOT) not in map(_real, sys.path):
        sys.path.insert(0, ROOT)
    os.environ["PYTHONSAFEPATH"] = "1"  # for the processes that libraries start


def _real(path: str) -> str:
    """Return the real path, or the path itself if the working directory was deleted."""
    try:
        return os.path.realpath(path)
    except OSError:
        return path


def foreign_package() -> str | None:
    """Return a message if ``import trainer`` does not find the package of this file."""
    import importlib.util

    spec = importlib.util.find_spec("trainer")
    folder = os.path.dirname(spec.origin) if spec and spec.origin else None
    if folder is not None and os.path.realpath(folder) == os.path.realpath(PACKAGE):
        return None
    where = spec.origin if spec and spec.origin else "a folder without __init__.py"
    return (
        f"'import trainer' finds {where} instead of promptshard's package in "
        f"{PACKAGE}; remove the folder of the other package from PYTHONPATH, or rename it"
    )


def main() -> None:
    """Clean the import path, then run a module in this process."""
    clean_path()
    import argparse
    import runpy
    import signal

    parser = argparse.ArgumentParser(description="Run a module with a clean import path.")
    parser.add_argument("--chdir", metavar="DIR", help="change to this folder first")
    parser.add_argument("--parent-death", metavar="SIGNAL", help="signal when the parent dies")
    parser.add_argument("--arguments-in-environment", action="store_true")
    parser.add_argument("module")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    if args.chdir is not None:
        os.chdir(args.chdir)
    if problem := foreign_package():
        sys.exit(refuse(problem))

    from trainer.runtime.process import die_with_parent
    from trainer.runtime.stdio import keep_streams

    if args.parent_death is not None:
        die_with_parent(signal.Signals[args.parent_death], int(os.environ.get(PARENT, "0")))
    os.environ[PARENT] = str(os.getpid())  # for children that are started in the same way
    # With kernels of a hub, functions of transformers become modules, which are not recognized.
    os.environ.setdefault("USE_HUB_KERNELS", "0")
    keep_streams()
    arguments = args.arguments
    if args.arguments_in_environment:
        arguments = _arguments_of_environment()
    sys.argv = [args.module, *arguments]
    try:
        runpy.run_module(args.module, run_name="__main__", alter_sys=True)
    except KeyboardInterrupt:  # no traceback for Ctrl-C
        sys.exit(128 + signal.SIGINT)


def refuse(problem: str) -> int:
    """Print a problem, once per host; return the exit code."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        sys.stderr.write(f"error: {problem}\n")
    return 2  # trainer.runtime.errors.EXIT_BAD_INPUT


if __name__ == "__main__":
    main()
