"""Metrics of tasks. Higher is better, and 1 is perfect.

``execution`` runs generated Python in other processes; ``code_sandbox`` documents their isolation.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from trainer.config import Task
from trainer.evaluation.statistics import STANDARD_ERROR, macro_f1, ratio_scores
from trainer.runtime.errors import BadInput
from trainer.runtime.limits import num_cores

_SANDBOX = Path(__file__).with_name("code_sandbox.py")
_MAX_PROCESSES = 4
#: A request without programs, for which the sandbox only reports its layers.
PROBE = {
    "function": "f",
    "cpu_seconds": 0.5,
    "wall_seconds": 5.0,
    "memory_bytes": 256 << 20,
    "processes": 1,
    "seccomp": True,
    "jobs": [],
}


def accuracy(predicted: Sequence[int], gold: Sequence[int]) -> float:
    """Share of rows whose predicted choice is the correct one."""
    return _mean([float(p == g) for p, g in zip(predicted, gold, strict=True)])


def matches(texts: Sequence[str], targets: Sequence[str]) -> list[bool]:
    """Whether each generated text equals its target, ignoring white space around both."""
    return [a.strip() == b.strip() for a, b in zip(texts, targets, strict=True)]


def choice_scores(predicted: Sequence[int], gold: Sequence[int]) -> dict[str, float]:
    """Accuracy, and macro F1 with its standard error, of predicted choices."""
    f1, error = macro_f1(predicted, gold)
    rate = accuracy(predicted, gold)
    return {"accuracy": rate, "macro_f1": f1, f"macro_f1{STANDARD_ERROR}": error}


def f1_terms(
    predicted: Sequence[Sequence[str]], gold: Sequence[Sequence[str]]
) -> tuple[list[float], list[int]]:
    """Numerator and denominator of micro-averaged F1 of every row: 2 TP and 2 TP + FP + FN."""
    sets = [(set(a), set(b)) for a, b in zip(predicted, gold, strict=True)]
    return [2.0 * len(a & b) for a, b in sets], [len(a) + len(b) for a, b in sets]


def label_set_scores(
    predicted: Sequence[Sequence[str]], gold: Sequence[Sequence[str]], task: Task
) -> dict[str, float]:
    """Scores of sets of labels; their order does not matter.

    Args:
        predicted: labels that the base model generated; any other text counts as a wrong label.

    Returns:
        ``exact_match``, the share of rows whose set is equal (subset accuracy), and, if it is the
        task's metric, ``f1`` over all labels of all rows (micro average) with its standard error.
    """
    equal = [float(set(a) == set(b)) for a, b in zip(predicted, gold, strict=True)]
    f1 = ratio_scores("f1", *f1_terms(predicted, gold)) if task.metric == "f1" else {}
    return f1 | {"exact_match": _mean(equal)}


def execution(
    texts: Sequence[str],
    tests: Sequence[Sequence[Mapping[str, Any]]],
    *,
    function: str = "f",
    cpu_seconds: float = 0.5,
    wall_seconds: float = 5.0,
    memory_mb: int = 256,
    processes: int = min(_MAX_PROCESSES, num_cores()),
    seccomp: bool = True,
) -> list[float]:
    """Run generated Python functions on test calls, in sandboxed processes with limits.

    A value is correct if it equals the expected one as JSON: a tuple is a list, ``True`` is not 1,
    floats may differ in the last digits. Code that raises, hangs, forks, opens files or uses too
    much memory scores 0 and does not affect other programs.

    Args:
        texts: Python source, each defining ``function``; surrounding white space is removed.
        tests: for each text its calls, ``{"args": [...], "result": ...}``; at least one. Only the
            arguments are passed to the sandbox.
        cpu_seconds: CPU time limit of one text, over all its calls.
        wall_seconds: wall time limit of one text.
        memory_mb: memory limit of one text, including the interpreter.
        seccomp: filter system calls if libseccomp is installed.

    Returns:
        1.0 for each text that passes all its tests, else 0.0.

    Raises:
        RuntimeError: the sandbox does not start, or a correct function fails in it.
    """
    request = {
        "function": function,
        "cpu_seconds": cpu_seconds,
        "wall_seconds": wall_seconds,
        "memory_bytes": memory_mb << 20,
        "processes": processes,
        "seccomp": seccomp,
    }
    jobs: list[dict[str, Any]] = []
    for i, (text, calls) in enumerate(zip(texts, tests, strict=True)):
        if not calls:
            raise ValueError(f"text {i} has no tests")
        code, args = textwrap.dedent(text).strip(), [call["args"] for call in calls]
        jobs.append({"index": i, "code": code, "args": args})
    outputs: dict[int, str] = {}
    while pending := [job for job in jobs if job["index"] not in outputs]:
        _, part = _run_sandbox({**request, "jobs": pending})
        # Without any output, the first program ended the sandbox: it scores 0, and the other
        # programs run in a new sandbox.
        outputs |= part or {pending[0]["index"]: ""}
    return [_score(outputs[i], calls) for i, calls in enumerate(tests)]


def check_sandbox() -> str | None:
    """Check that generated code can run on this system.

    Returns:
        A warning if the system lacks the layers that isolate code from other processes.

    Raises:
        BadInput: the sandbox does not work.
    """
    try:
        layers, _ = _run_sandbox(PROBE)
    except RuntimeError as error:
        raise BadInput(f"metric: execution: {error}") from None
    if layers:
        return None
    return (
        "metric: execution: this system has neither namespaces nor seccomp (libseccomp.so.2) for "
        "generated code, so it could signal processes of this user and delete files; see "
        "trainer/evaluation/code_sandbox.py"
    )


def _score(output: str, calls: Sequence[Mapping[str, Any]]) -> float:
    try:
        values = json.loads(output)
    except (ValueError, RecursionError):
        return 0.0
    expected = json.loads(json.dumps([call["result"] for call in calls]))
    return float(_same(values, expected))


def _same(got: Any, expected: Any) -> bool:
    """Whether JSON values are equal: a boolean is not a number, floats may differ slightly.

    NaN equals NaN, which a column of tests can hold if it is JSON as text.
    """
    if isinstance(expected, bool) or isinstance(got, bool):
        return got is expected
    if isinstance(expected, (int, float)) and isinstance(got, (int, float)):
        if isinstance(expected, int) and isinstance(got, int):
            return got == expected
        try:
            is_close = math.isclose(got, expected, rel_tol=1e-9, abs_tol=1e-12)
            return is_close or (math.isnan(got) and math.isnan(expected))
        except OverflowError:  # an integer beyond all floats
            return False
    if isinstance(expected, list) and isinstance(got, list):
        return len(got) == len(expected) and all(map(_same, got, expected))
    if isinstance(expected, dict) and isinstance(got, dict):
        return got.keys() == expected.keys() and all(_same(got[k], expected[k]) for k in got)
    return type(got) is type(expected) and bool(got == expected)


def _run_sandbox(request: Mapping[str, Any]) -> tuple[list[str], dict[int, str]]:
    """Start the sandbox once.

    Returns:
        Active layers, and the output of each program that ended before the sandbox did.
    """
    # Some interpreters need these to load their library. Nothing else of the environment is passed.
    keep = {k: v for k, v in os.environ.items() if k in ("LD_LIBRARY_PATH", "SYSTEMROOT")}
    with tempfile.TemporaryDirectory(prefix="promptshard-") as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-X", "utf8", str(_SANDBOX)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            cwd=folder,
            env=keep,
            start_new_session=True,
        )
        timeout = 30 + request["wall_seconds"] * len(request["jobs"])
        alarm = threading.Timer(timeout, _kill_group, [process.pid])
        alarm.start()
        try:
            output, errors = process.communicate(json.dumps(request))
        finally:
            alarm.cancel()
            _kill_group(process.pid)
            process.wait()
    ready, *lines = output.splitlines() or [""]
    if not ready.startswith("ready"):
        raise RuntimeError(f"the sandbox of metric execution does not start: {errors.strip()}")
    return ready.split()[1:], dict(json.loads(line) for line in lines if line.endswith("]"))


def _kill_group(pid: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _mean(scores: Sequence[float]) -> float:
    if not scores:
        raise ValueError("a metric over no rows")
    return sum(scores) / len(scores)
