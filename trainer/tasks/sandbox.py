"""Runs generated Python functions; a script of its own, started by ``metrics`` with ``-I -S``.

It imports only the standard library. Every snippet runs in a forked child, so none can disturb
another; the child gives up, in this order and as far as the system allows,

1. time, memory, files and processes, by resource limits (a CPU timer that cannot be caught),
2. on Linux: every system call but those that compute, read and exit (seccomp, an allow list),
3. root's rights, where 2 is not to be had: the process limit does not hold for root,
4. whatever Python can report to an audit hook: opening for writing, processes, sockets, ctypes.

It keeps honest code that went wrong from doing harm. It is no jail for code that attacks it.

In: one JSON object on stdin. Out: a line ``ready LAYERS``, then ``INDEX SCORE`` per snippet.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import math
import os
import platform
import resource
import selectors
import signal
import struct
import sys
import time
from typing import Any

MOST_OUTPUT = 4 << 20  # bytes of results of one snippet
NOBODY = 65534
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP = 1, 38, 22

# Calls that computing, importing and exiting need; openat is allowed for reading only.
# linux/arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h
ALLOWED = {
    "x86_64": {
        "audit": 0xC000003E,
        "openat": 257,
        # read write close stat fstat lstat poll lseek mmap mprotect munmap brk rt_sigprocmask
        # rt_sigreturn ioctl pread readv writev access sched_yield mremap madvise dup getpid exit
        # fcntl getcwd readlink getuid getgid geteuid getegid sigaltstack gettid futex getdents64
        # clock_gettime clock_getres exit_group newfstatat readlinkat set_robust_list
        # getrandom membarrier rseq faccessat2 faccessat statx uname sysinfo restart_syscall
        "calls": (
            *(0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 15, 16, 17, 19, 20, 21, 24, 25, 28, 32),
            *(39, 60, 63, 72, 79, 89, 97, 99, 102, 104, 107, 108, 131, 186, 202, 217, 219, 228),
            *(229, 231, 262, 267, 269, 273, 318, 324, 332, 334, 439),
        ),
    },
    "aarch64": {
        "audit": 0xC00000B7,
        "openat": 56,
        "calls": (
            *(17, 23, 25, 29, 48, 57, 61, 62, 63, 64, 65, 66, 67, 73, 78, 79, 80, 93, 94, 98, 99),
            *(113, 114, 124, 128, 132, 135, 139, 160, 163, 172, 174, 175, 176, 177, 178, 179),
            *(214, 215, 216, 222, 226, 233, 278, 283, 291, 293, 439),
        ),
    },
}
# Imported before the fork: fast, and there even if only root may read the library.
COMMON_MODULES: tuple[str, ...] = (
    *("bisect", "collections", "copy", "dataclasses", "datetime", "decimal", "enum", "fractions"),
    *("functools", "heapq", "itertools", "operator", "random", "re", "statistics", "string"),
    "typing",
)
BLOCKED_MODULES = {"ctypes", "_ctypes", "subprocess", "multiprocessing", "socket", "_socket"}
ALLOWED_EVENTS = (
    *("compile", "exec", "import", "marshal.", "object.", "os.listdir", "os.scandir"),
    *("code.", "builtins.id", "sys._getframe", "array.", "time.sleep", "pickle."),
)


def seccomp_program() -> bytes | None:
    """The filter in classic BPF, or None on an unknown machine."""
    table: Any = ALLOWED.get(platform.machine())
    if not sys.platform.startswith("linux") or table is None or sys.maxsize < 2**32:
        return None
    load, equal, any_bit, give = 0x20, 0x15, 0x45, 0x06
    allow, refuse = 0x7FFF0000, 0x00050000 | 1  # SECCOMP_RET_ERRNO with EPERM
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    calls = table["calls"]
    program = [
        (load, 0, 0, 4),  # seccomp_data.arch: a foreign calling convention is refused
        (equal, 1, 0, table["audit"]),
        (give, 0, 0, refuse),
        (load, 0, 0, 0),  # seccomp_data.nr
        (equal, 0, 3, table["openat"]),
        (load, 0, 0, 32),  # lower half of its third argument, the flags
        (any_bit, 0, len(calls) + 2, writing),  # not writing: go to the last line
        (give, 0, 0, refuse),
        *((equal, len(calls) - i, 0, number) for i, number in enumerate(calls)),
        (give, 0, 0, refuse),
        (give, 0, 0, allow),
    ]
    return b"".join(struct.pack("HBBI", *line) for line in program)


class _Program(ctypes.Structure):
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def apply_seccomp(libc: Any, program: bytes) -> bool:
    """Put the filter on this process, for good."""
    buffer = ctypes.create_string_buffer(program, len(program))
    wrapped = _Program(len(program) // 8, ctypes.cast(buffer, ctypes.c_void_p))
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        return False
    return bool(libc.prctl(PR_SET_SECCOMP, 2, ctypes.byref(wrapped), 0, 0) == 0)


def works(libc: Any, program: bytes | None) -> bool:
    """Whether the kernel takes the filter, tried in a child."""
    if program is None:
        return False
    pid = os.fork()
    if pid == 0:
        os._exit(0 if apply_seccomp(libc, program) else 1)
    return os.waitpid(pid, 0)[1] == 0


def limit(cpu_seconds: float, memory_bytes: int) -> None:
    """Resource limits of one snippet. SIGPROF and SIGXCPU end the process; nothing catches them."""
    for number in (signal.SIGPROF, signal.SIGXCPU, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
    seconds = math.ceil(cpu_seconds) + 1
    wanted = [
        ("RLIMIT_CPU", seconds),
        ("RLIMIT_AS", memory_bytes),
        ("RLIMIT_FSIZE", 0),
        ("RLIMIT_CORE", 0),
        ("RLIMIT_NOFILE", 32),
        ("RLIMIT_NPROC", 0),
        ("RLIMIT_MEMLOCK", 0),
    ]
    for name, value in wanted:
        try:
            resource.setrlimit(getattr(resource, name), (value, value))
        except (AttributeError, ValueError, OSError):
            continue  # not on this system: the other layers remain
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def drop_root() -> None:
    """Root's processes are not counted by RLIMIT_NPROC, and root may remove any file."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)


def audit(event: str, arguments: tuple[Any, ...]) -> None:
    """Refuse what a function on plain values has no need of."""
    if event == "open":
        mode, flags = arguments[1], arguments[2]
        writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
        if (isinstance(mode, str) and set(mode) & set("wax+")) or (flags or 0) & writing:
            raise PermissionError("writing is not allowed here")
        return
    if event == "import" and str(arguments[0]).split(".")[0] in BLOCKED_MODULES:
        raise ImportError(f"{arguments[0]} is not allowed here")
    if not event.startswith(ALLOWED_EVENTS):
        raise PermissionError(f"{event} is not allowed here")


def run_snippet(job: dict[str, Any], function: str, out: int) -> None:
    """In the child: define the function, call it, write the results as JSON."""
    namespace: dict[str, Any] = {"__name__": "snippet"}
    exec(compile(job["code"], "snippet", "exec"), namespace)  # this process exists for it
    results = [namespace[function](*args) for args in job["args"]]
    payload = json.dumps(results).encode()
    while payload:
        payload = payload[os.write(out, payload) :]


def child(job: dict[str, Any], settings: dict[str, Any], layers: list[str], out: int) -> None:
    """The whole life of a forked child. Never returns."""
    code = 1
    try:
        os.setsid()
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        os.dup2(out, 3)
        os.closerange(4, 256)
        libc = ctypes.CDLL(None, use_errno=True)
        if sys.platform.startswith("linux"):
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        program = seccomp_program()
        limit(settings["cpu_seconds"], settings["memory_bytes"])
        if "nobody" in layers:
            drop_root()
        if "seccomp" in layers and not (program and apply_seccomp(libc, program)):
            os._exit(1)
        sys.addaudithook(audit)
        run_snippet(job, settings["function"], 3)
        code = 0
    except BaseException:  # whatever the snippet raises, the answer is the same: it failed
        code = 1
    finally:
        os._exit(code)


def same(got: Any, expected: Any) -> bool:
    """Equality of JSON values: a truth value is no number, floats may differ in the last digits."""
    if isinstance(expected, bool) or isinstance(got, bool):
        return got is expected
    if isinstance(expected, (int, float)) and isinstance(got, (int, float)):
        if isinstance(expected, int) and isinstance(got, int):
            return got == expected
        return math.isclose(got, expected, rel_tol=1e-9, abs_tol=1e-12)
    if isinstance(expected, list) and isinstance(got, list):
        return len(got) == len(expected) and all(map(same, got, expected))
    if isinstance(expected, dict) and isinstance(got, dict):
        return got.keys() == expected.keys() and all(same(got[k], expected[k]) for k in got)
    return type(got) is type(expected) and bool(got == expected)


class Running:
    """A child at work, seen from the parent."""

    def __init__(self, job: dict[str, Any], settings: dict[str, Any], layers: list[str]) -> None:
        self.job = job
        self.output = bytearray()
        self.pipe, out = os.pipe()
        self.deadline = time.monotonic() + settings["wall_seconds"]
        self.pid = os.fork()
        if self.pid == 0:
            child(job, settings, layers, out)
        os.close(out)

    def finish(self) -> float:
        """End the child and its group, and compare its results."""
        for target in (-self.pid, self.pid):
            try:
                os.kill(target, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                continue
        os.waitpid(self.pid, 0)
        os.close(self.pipe)
        try:
            results = json.loads(self.output)
        except (ValueError, RecursionError):
            return 0.0
        return float(same(results, self.job["results"]))


def serve(request: dict[str, Any], layers: list[str]) -> None:
    """Run all jobs, some at a time; one line per result."""
    jobs = list(reversed(request["jobs"]))
    selector = selectors.DefaultSelector()
    running: list[Running] = []
    while jobs or running:
        while jobs and len(running) < request["processes"]:
            started = Running(jobs.pop(), request, layers)
            selector.register(started.pipe, selectors.EVENT_READ, started)
            running.append(started)
        wait = max(0.0, min(one.deadline for one in running) - time.monotonic())
        ended = []
        for key, _ in selector.select(wait):
            one: Running = key.data
            block = os.read(one.pipe, 1 << 16)
            one.output += block
            if not block or len(one.output) > MOST_OUTPUT:
                ended.append(one)
        now = time.monotonic()
        ended += [one for one in running if one.deadline <= now and one not in ended]
        for one in ended:
            selector.unregister(one.pipe)
            running.remove(one)
            print(one.job["index"], one.finish(), flush=True)


def passes(request: dict[str, Any], layers: list[str]) -> bool:
    """Whether a right function passes; else every score would be 0 and look like a result."""
    code = f"def {request['function']}(x): return x + 1"
    probe = Running({"code": code, "args": [[1]], "results": [2]}, request, layers)
    while block := os.read(probe.pipe, 1 << 16):
        probe.output += block
    return probe.finish() == 1.0


def main() -> None:
    request = json.load(sys.stdin)
    libc = ctypes.CDLL(None, use_errno=True)
    if sys.platform.startswith("linux"):
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    for name in COMMON_MODULES:
        importlib.import_module(name)
    candidates = [["nobody"]]
    if request["seccomp"] and works(libc, seccomp_program()):
        candidates.insert(0, ["seccomp"])
    layers = next((layers for layers in candidates if passes(request, layers)), None)
    if layers is None:
        raise SystemExit("a function that is right fails under the limits")
    print("ready", *layers, flush=True)
    serve(request, layers)


if __name__ == "__main__":
    main()
