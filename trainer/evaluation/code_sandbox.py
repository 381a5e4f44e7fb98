"""Runs generated Python functions; a script of its own, started by ``metrics`` with ``-I -S``.

It is given code and call arguments and returns values; expected results never leave the trainer.
Every program runs in a forked child that has nothing to read: no environment, no memory of the
trainer, no open file but /dev/null and the pipe for its values. What a child is kept from:

===========================================  =======================================================
everywhere                                   more time, memory, processes or threads than the limits
                                             allow; opening any file, device or socket; being root
                                             (as root this script becomes nobody, or refuses to run)
Linux, where namespaces are permitted        seeing or signalling any process outside; the network;
                                             naming any file (chroot)
Linux on x86_64 and aarch64                  every system call that computing does not need
                                             (seccomp allow list): signals, ioctl, fcntl, chmod, ...
===========================================  =======================================================

Not protected: with neither namespaces nor seccomp (macOS, say), a program may signal or trace
processes of the same user and rename or delete that user's files. Without seccomp, programs that
run at the same time may end each other. Faults of the kernel itself and timing attacks are out of
scope.

In: one JSON object on stdin. Out: a line ``ready LAYERS``, then ``[index, text]`` for each program:
its values as JSON, or whatever else it wrote.
"""

from __future__ import annotations

import contextlib
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

MOST_OUTPUT = 4 << 20  # bytes of values of one program
NOBODY = 65534
# linux/prctl.h, linux/sched.h, linux/capability.h
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = (1 << bit for bit in (27, 28, 29, 30))
CAPABILITY_VERSION = 0x20080522

# read write close mmap mprotect munmap brk rt_sigprocmask rt_sigreturn sched_yield mremap madvise
# nanosleep getpid exit uname gettimeofday sysinfo getuid getgid geteuid getegid sigaltstack gettid
# time futex clock_gettime clock_getres clock_nanosleep exit_group set_robust_list getrandom
# membarrier rseq; from linux/arch/x86/entry/syscalls/syscall_64.tbl and asm-generic/unistd.h
SYSTEM_CALLS = {
    "x86_64": (
        0xC000003E,  # AUDIT_ARCH: another calling convention is refused
        (
            *(0, 1, 3, 9, 10, 11, 12, 14, 15, 24, 25, 28, 35, 39, 60, 63, 96, 99, 102, 104, 107),
            *(108, 131, 186, 201, 202, 228, 229, 230, 231, 273, 318, 324, 334),
        ),
    ),
    "aarch64": (
        0xC00000B7,
        (
            *(57, 63, 64, 93, 94, 98, 99, 101, 113, 114, 115, 124, 132, 135, 139, 160, 169, 172),
            *(174, 175, 176, 177, 178, 179, 214, 215, 216, 222, 226, 233, 278, 283, 293),
        ),
    ),
}
#: Imported before anything is given up; a program can import nothing else.
MODULES: tuple[str, ...] = (
    *("_strptime", "abc", "array", "ast", "base64", "binascii", "bisect", "calendar", "cmath"),
    *("collections", "collections.abc", "colorsys", "contextlib", "copy", "csv", "dataclasses"),
    *("datetime", "decimal", "difflib", "encodings.ascii", "encodings.idna", "encodings.latin_1"),
    *("encodings.cp1252", "encodings.hex_codec", "encodings.punycode", "encodings.rot_13"),
    *("encodings.unicode_escape", "encodings.utf_16", "encodings.utf_32", "encodings.utf_8_sig"),
    *("enum", "fractions", "functools", "graphlib"),
    *("hashlib", "heapq", "hmac", "html", "inspect", "io", "ipaddress", "itertools", "json"),
    *("keyword", "locale", "math", "numbers", "operator", "pprint", "queue", "random", "re"),
    *(
        "reprlib",
        "secrets",
        "statistics",
        "string",
        "stringprep",
        "struct",
        "textwrap",
        "threading",
    ),
    *("time", "timeit", "traceback", "types", "typing", "unicodedata", "urllib.parse", "uuid"),
    *("warnings", "weakref", "zlib"),
)


def limit(cpu_seconds: float, memory_bytes: int) -> None:
    """Set the limits of one program; none can be raised again."""
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)  # finer than RLIMIT_CPU
    limits = {
        "RLIMIT_CPU": math.ceil(cpu_seconds) + 1,
        "RLIMIT_AS": memory_bytes,
        "RLIMIT_NOFILE": 0,
        "RLIMIT_NPROC": 0,
        "RLIMIT_FSIZE": 0,
        "RLIMIT_CORE": 0,
        "RLIMIT_MEMLOCK": 0,
        "RLIMIT_MSGQUEUE": 0,
    }
    for name, value in limits.items():
        if hasattr(resource, name):
            resource.setrlimit(getattr(resource, name), (value, value))


def seccomp(libc: Any) -> bool:
    """Refuse all system calls but those of ``SYSTEM_CALLS``; False if the system cannot."""
    machine, calls = SYSTEM_CALLS.get(platform.machine(), (0, ()))
    if libc is None or not calls or sys.maxsize < 2**32:
        return False
    load, equal, give = 0x20, 0x15, 0x06
    allow, refuse = 0x7FFF0000, 0x00050001  # SECCOMP_RET_ALLOW; SECCOMP_RET_ERRNO with EPERM
    program = [
        (load, 0, 0, 4),  # seccomp_data.arch
        (equal, 0, len(calls) + 1, machine),
        (load, 0, 0, 0),  # seccomp_data.nr
        *((equal, len(calls) - i, 0, number) for i, number in enumerate(calls)),
        (give, 0, 0, refuse),
        (give, 0, 0, allow),
    ]
    content = b"".join(struct.pack("HBBI", *line) for line in program)
    buffer = ctypes.create_string_buffer(content, len(content))
    header = struct.pack("HP", len(program), ctypes.addressof(buffer))
    return bool(libc.prctl(PR_SET_SECCOMP, 2, header, 0, 0) == 0)


def isolate(libc: Any) -> bool:
    """Give up the network, other processes, all files and root's rights; True with namespaces.

    Raises:
        SystemExit: this is root, and cannot become another user.
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
        # The rights of a new user namespace; without them no limit can be raised there.
        libc.capset(struct.pack("II", CAPABILITY_VERSION, 0), bytes(24))
        libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)  # not to be traced by the programs
    return isolated


def run_program(job: dict[str, Any], function: str) -> None:
    """Define the function, call it, write the values as JSON."""
    namespace: dict[str, Any] = {"__name__": "program"}
    exec(compile(job["code"], "program", "exec"), namespace)  # this process exists for it
    payload = json.dumps([namespace[function](*args) for args in job["args"]]).encode()
    while payload:
        payload = payload[os.write(3, payload) :]


class SandboxedProgram:
    """A program at work, seen from the server."""

    def __init__(self, job: dict[str, Any], request: dict[str, Any]) -> None:
        self.index = job["index"]
        self.output = bytearray()
        self.pipe, out = os.pipe()
        self.deadline = time.monotonic() + request["wall_seconds"]
        self.pid = os.fork()
        if self.pid == 0:
            self._child(job, request, out)
        os.close(out)

    @staticmethod
    def _child(job: dict[str, Any], request: dict[str, Any], out: int) -> None:
        """Never returns."""
        code = 1
        try:
            os.setsid()
            for fd in (0, 1, 2):
                os.dup2(request["null"], fd)
            os.dup2(out, 3)
            os.closerange(4, 256)
            limit(request["cpu_seconds"], request["memory_bytes"])
            if request["seccomp"] and not seccomp(request["libc"]):
                os._exit(1)
            run_program(job, request["function"])
            code = 0
        finally:
            os._exit(code)  # whatever the program raises, the answer is the same: it failed

    def read(self) -> bool:
        """Read what is there; False once there is no more, or too much."""
        block = os.read(self.pipe, 1 << 16)
        self.output += block
        return bool(block) and len(self.output) <= MOST_OUTPUT

    def finish(self) -> str:
        """End the program and its group; what it wrote."""
        for target in (-self.pid, self.pid):
            try:
                os.kill(target, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                continue
        os.waitpid(self.pid, 0)
        os.close(self.pipe)
        return self.output.decode(errors="replace")


def works(request: dict[str, Any]) -> bool:
    """Whether a right function passes; else every score would be 0 and look like a result."""
    code = f"def {request['function']}(x): return x + 1"
    probe = SandboxedProgram({"index": -1, "code": code, "args": [[1]]}, request)
    while probe.read():
        pass
    return probe.finish() == "[2]"


def serve(request: dict[str, Any]) -> None:
    """Run all programs, some at a time; one line for each."""
    jobs = list(reversed(request["jobs"]))
    selector = selectors.DefaultSelector()
    running: list[SandboxedProgram] = []
    while jobs or running:
        while jobs and len(running) < request["processes"]:
            started = SandboxedProgram(jobs.pop(), request)
            selector.register(started.pipe, selectors.EVENT_READ, started)
            running.append(started)
        wait = max(0.0, min(one.deadline for one in running) - time.monotonic())
        ended = [key.data for key, _ in selector.select(wait) if not key.data.read()]
        now = time.monotonic()
        ended += [one for one in running if one.deadline <= now and one not in ended]
        for one in ended:
            selector.unregister(one.pipe)
            running.remove(one)
            print(json.dumps([one.index, one.finish()]), flush=True)


def main() -> None:
    request = json.load(sys.stdin)
    libc = ctypes.CDLL(None, use_errno=True) if sys.platform.startswith("linux") else None
    for name in MODULES:
        importlib.import_module(name)
    time.localtime()  # reads the time zone
    os.environ.clear()
    request |= {"libc": libc, "null": os.open(os.devnull, os.O_RDWR)}
    isolated = isolate(libc)
    if isolated and (server := os.fork()):  # the first process of the new PID namespace
        raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(server, 0)[1]))
    if libc is not None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if not works(request):
        request["seccomp"] = False
        if not works(request):
            raise SystemExit("a function that is right fails under the limits")
    named = (("namespaces", isolated), ("seccomp", request["seccomp"]))
    print("ready", *(name for name, there in named if there), flush=True)
    serve(request)


if __name__ == "__main__":
    main()
