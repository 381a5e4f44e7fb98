"""Run generated Python functions in isolated processes; ``metrics`` starts this script.

The script receives code and call arguments and returns values; it never receives the expected
results. Each program runs in a forked child without environment variables and without open files
except /dev/null and the pipe for its values.

=====================================  =============================================================
everywhere                             limits on CPU time, wall time, memory, processes and threads;
                                       no file, device or socket can be opened; never runs as root
                                       (root becomes the user nobody, or the script refuses to run)
Linux, where namespaces are permitted  no network, no other process visible, no file name resolves
                                       (chroot)
Linux with libseccomp.so.2             only system calls that computing needs (allow list): no
                                       signals, ioctl, fcntl, chmod, unlink, ...
=====================================  =============================================================

Not protected: without namespaces and without seccomp (on macOS, for example), a program can signal
or trace processes of the same user and rename or delete that user's files; ``check_sandbox`` warns.
Without seccomp, programs that run at the same time can kill each other. Kernel bugs and timing
attacks are out of scope.

Input: one JSON object on stdin. Output: a line ``ready LAYERS``, then ``[index, text]`` for each
program. The text is its return values as JSON, or any other output that the program wrote.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import math
import os
import resource
import select
import signal
import struct
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

MAX_OUTPUT = 4 << 20  # bytes of values of one program
NOBODY = 65534
# linux/prctl.h, linux/sched.h, linux/capability.h
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS = 1, 4, 38
CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = (1 << bit for bit in (27, 28, 29, 30))
CAPABILITY_VERSION = 0x20080522
SECCOMP_ALLOW, SECCOMP_EPERM = 0x7FFF0000, 0x00050001  # SCMP_ACT_ALLOW, SCMP_ACT_ERRNO(EPERM)

SYSTEM_CALLS = """
    read write close mmap mprotect munmap brk rt_sigprocmask rt_sigreturn sched_yield mremap madvise
    nanosleep getpid exit uname gettimeofday sysinfo getuid getgid geteuid getegid sigaltstack
    gettid time futex clock_gettime clock_getres clock_nanosleep exit_group set_robust_list
    getrandom membarrier rseq
""".split()  # noqa: SIM905
#: Imported before files become inaccessible; a program can import nothing else.
MODULES = """
    _strptime abc array ast base64 binascii bisect calendar cmath collections collections.abc
    colorsys contextlib copy csv dataclasses datetime decimal difflib encodings.ascii
    encodings.cp1252 encodings.hex_codec encodings.idna encodings.latin_1 encodings.punycode
    encodings.rot_13 encodings.unicode_escape encodings.utf_16 encodings.utf_32 encodings.utf_8_sig
    enum fractions functools graphlib hashlib heapq hmac html inspect io ipaddress itertools json
    keyword locale math numbers operator pprint queue random re reprlib secrets statistics string
    stringprep struct textwrap threading time timeit traceback types typing unicodedata urllib.parse
    uuid warnings weakref zlib
""".split()  # noqa: SIM905
#: Resource limits that are set to zero.
FORBIDDEN = ("NOFILE", "NPROC", "FSIZE", "CORE", "MEMLOCK", "MSGQUEUE")


def set_limits(cpu_seconds: float, memory_bytes: int) -> None:
    """Limit this process; it cannot raise a limit again."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)  # finer than RLIMIT_CPU
    limits = {"CPU": math.ceil(cpu_seconds) + 1, "AS": memory_bytes, **dict.fromkeys(FORBIDDEN, 0)}
    for name, value in limits.items():
        if hasattr(resource, f"RLIMIT_{name}"):
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


def make_system_call_filter() -> Callable[[], bool]:
    """Return a function that restricts this process to ``SYSTEM_CALLS``; others fail with EPERM.

    The function returns False if the kernel refuses the filter.

    Raises:
        OSError: libseccomp is not installed.
    """
    library = ctypes.CDLL("libseccomp.so.2")
    library.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(library.seccomp_init(SECCOMP_EPERM))
    for name in SYSTEM_CALLS:  # a name that this architecture lacks gets a negative number
        number = library.seccomp_syscall_resolve_name(name.encode())
        library.seccomp_rule_add(context, SECCOMP_ALLOW, number, 0)
    return lambda: bool(library.seccomp_load(context) == 0)


def isolate(libc: Any) -> bool:
    """Remove access to network, files and other processes, and drop root privileges.

    Returns:
        Whether namespaces isolate this process.

    Raises:
        SystemExit: this process runs as root and cannot become another user.
    """
    root, isolated = os.geteuid() == 0, False
    if libc is not None:
        libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        spaces = CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET | (0 if root else CLONE_NEWUSER)
        isolated = libc.unshare(spaces) == 0
    with contextlib.suppress(OSError):  # not permitted: the other layers remain
        os.chroot(".")  # an empty folder
    if root:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        except OSError as error:
            raise SystemExit(
                f"generated code is never run as root, and root cannot become another user here "
                f"({error.strerror}); run as a user"
            ) from None
    if libc is not None:
        # Drop the capabilities in the new user namespace, which would allow raising limits.
        libc.capset(struct.pack("II", CAPABILITY_VERSION, 0), bytes(24))
        libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)  # the programs cannot trace this process
    return isolated


@dataclass
class RunningProgram:
    index: int
    pid: int
    output: bytearray
    deadline: float  #: by ``time.monotonic``


def start(job: dict[str, Any], request: dict[str, Any]) -> tuple[int, RunningProgram]:
    """Start a program in a child process; return the pipe that it writes to, and its state."""
    pipe, out = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            run_child(job, request, out)
        finally:
            os._exit(0)  # after any exception: a program without complete output has failed
    os.close(out)
    deadline = time.monotonic() + request["wall_seconds"]
    return pipe, RunningProgram(job["index"], pid, bytearray(), deadline)


def run_child(job: dict[str, Any], request: dict[str, Any], out: int) -> None:
    """Limit this process, define the function, call it and write the values as JSON."""
    os.setsid()
    for descriptor in (0, 1, 2):
        os.dup2(request["null"], descriptor)
    os.dup2(out, 3)
    os.closerange(4, 256)
    set_limits(request["cpu_seconds"], request["memory_bytes"])
    if request["filter"] is not None and not request["filter"]():
        return
    namespace: dict[str, Any] = {"__name__": "program"}
    exec(compile(job["code"], "program", "exec"), namespace)  # in the isolated child process
    values = [namespace[request["function"]](*args) for args in job["args"]]
    payload = json.dumps(values).encode()
    while payload:
        payload = payload[os.write(3, payload) :]


def stop(pipe: int, program: RunningProgram) -> str:
    """Kill a program and its process group; return its output."""
    for target in (-program.pid, program.pid):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(target, signal.SIGKILL)
    os.waitpid(program.pid, 0)
    os.close(pipe)
    return program.output.decode(errors="replace")


def run_programs(jobs: list[dict[str, Any]], request: dict[str, Any]) -> Iterator[tuple[int, str]]:
    """Run programs, ``request["processes"]`` at a time; yield index and output of each."""
    waiting = list(reversed(jobs))
    running: dict[int, RunningProgram] = {}
    while waiting or running:
        while waiting and len(running) < request["processes"]:
            running.update([start(waiting.pop(), request)])
        timeout = min(program.deadline for program in running.values()) - time.monotonic()
        readable, _, _ = select.select(list(running), [], [], max(0.0, timeout))
        for pipe, program in list(running.items()):
            block = os.read(pipe, 1 << 16) if pipe in readable else None
            program.output.extend(block or b"")
            too_long = len(program.output) > MAX_OUTPUT
            if block == b"" or too_long or time.monotonic() >= program.deadline:
                del running[pipe]
                yield program.index, stop(pipe, program)


def works(request: dict[str, Any]) -> bool:
    """Whether a correct function passes; otherwise every score would be 0."""
    code = f"def {request['function']}(x): return x + 1"
    probe = {"index": -1, "code": code, "args": [[1]]}
    return list(run_programs([probe], request)) == [(-1, "[2]")]


def main() -> None:
    request = json.load(sys.stdin)
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform.startswith("linux") else None
    request["filter"] = None
    if request["seccomp"]:
        with contextlib.suppress(OSError):
            request["filter"] = make_system_call_filter()
    for name in MODULES:
        importlib.import_module(name)
    time.localtime()  # reads the time zone file while files are accessible
    os.environ.clear()
    request["null"] = os.open(os.devnull, os.O_RDWR)
    isolated = isolate(libc)
    if isolated and (server := os.fork()):  # the first process of the new PID namespace
        raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(server, 0)[1]))
    if libc is not None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if not works(request):
        request["filter"] = None
        if not works(request):
            raise SystemExit("a correct function fails under the limits")
    layers = (("namespaces", isolated), ("seccomp", request["filter"] is not None))
    print("ready", *(name for name, active in layers if active), flush=True)
    for index, output in run_programs(request["jobs"], request):
        print(json.dumps([index, output]), flush=True)


if __name__ == "__main__":
    main()
