"""Take from this process what an answer could do harm with. Standard library only: it runs in the child, by its path.

What each layer takes away:

* **resource limits**: memory, processor time, file size, open files, core dumps;
* **capabilities**: all of them, so that root is root no more;
* **Landlock** (Linux 6.2; before, it could not keep a file from being cut short): files outside the folders that are
  named; signals to other processes (Linux 6.12);
* **seccomp**: sockets, new processes, signals, tracing, changing owners and modes, io_uring, and more of that kind.

What is left: processor time and memory up to the limits, files in a folder of its own. The parent adds a limit of time.
Sources: seccomp(2), landlock(7), capabilities(7); the syscall numbers are those of the kernel's tables.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import signal
import struct
from collections.abc import Sequence

# name: (x86_64, aarch64); None: the machine has no such call
DENIED: dict[str, tuple[int | None, int | None]] = {
    "socket": (41, 198),
    "fork": (57, None),
    "vfork": (58, None),
    "execve": (59, 221),
    "execveat": (322, 281),
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "setsid": (112, 157),
    "setpgid": (109, 154),
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "lchown": (94, None),
    "fchown": (93, 55),
    "fchownat": (260, 54),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "setpriority": (141, 140),
    "ioprio_set": (251, 30),
    "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119),
    "sched_setattr": (314, 274),
    "sched_setaffinity": (203, 122),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "bpf": (321, 280),
    "userfaultfd": (323, 282),
    "perf_event_open": (298, 241),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "chroot": (161, 51),
}
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of DENIED, AUDIT_ARCH_*
# name: (numbers as above, second arguments refused): the kernel would send a signal of their choice to whom they name
DENIED_WITH: dict[str, tuple[tuple[int, int], tuple[int, ...]]] = {
    "fcntl": ((72, 25), (8, 10, 15)),  # F_SETOWN, F_SETSIG, F_SETOWN_EX
    "ioctl": ((16, 29), (0x8901, 0x8902)),  # FIOSETOWN, SIOCSPGRP
}
CLONE, CLONE3, PRLIMIT, CAPSET = (56, 220), (435, 435), (302, 261), (126, 91)
CLONE_THREAD = 0x10000
ALLOW, ERRNO, KILL = 0x7FFF0000, 0x00050000, 0x80000000
EPERM, ENOSYS = 1, 38
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
LEAST_LANDLOCK = 3  # earlier ones cannot deny cutting a file short
READ = 0b1101  # execute, read file, read folder
RIGHTS_OF_VERSION = {1: 13, 2: 14, 3: 15, 4: 15}  # file rights that each version knows; 5 and later: 16
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP = 1, 4, 38, 22


class IsolationError(Exception):
    """A layer could not be put in place: what was to run must not run."""


def support() -> list[str]:
    """What is missing here for full isolation, in words; empty if all is there."""
    if platform.system() != "Linux" or platform.machine() not in MACHINES:
        return [f"Linux on x86_64 or aarch64 (this is {platform.system()} on {platform.machine()})"]
    missing = [] if _landlock_version() >= LEAST_LANDLOCK else ["Landlock (Linux 6.2, switched on)"]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(21, 0, 0, 0, 0) < 0:  # PR_GET_SECCOMP
        missing.append("seccomp")
    return missing


def limit_resources(memory_bytes: int, cpu_seconds: int, file_bytes: int) -> None:
    """Hard limits on memory, processor time, file size and open files; no core dump; dies with its parent."""
    for what, most in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(what)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        try:
            resource.setrlimit(what, (most, most))
        except (ValueError, OSError) as error:
            if platform.system() == "Linux":  # elsewhere an address space cannot always be limited
                raise IsolationError(f"resource limit {what}: {error}") from error


def isolate(readable: Sequence[str], writable: Sequence[str]) -> None:
    """Capabilities, Landlock and seccomp. It cannot be undone.

    Raises:
        IsolationError: a layer is missing.
    """
    if missing := support():
        raise IsolationError(f"missing: {', '.join(missing)}")
    libc = ctypes.CDLL(None, use_errno=True)
    column, arch = MACHINES[platform.machine()]
    _call(libc, "prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    _call(libc, "prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)
    _call(libc, "prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    header = struct.pack("Ii", 0x20080522, 0)
    _call(libc, "syscall", CAPSET[column], header, struct.pack("6I", *[0] * 6))
    _landlock(libc, readable, writable)
    code = b"".join(struct.pack("HBBI", *step) for step in program(column, arch))
    buffer = ctypes.create_string_buffer(code, len(code))
    filter_ = ctypes.create_string_buffer(struct.pack("HP", len(code) // 8, ctypes.addressof(buffer)))
    _call(libc, "prctl", PR_SET_SECCOMP, 2, filter_, 0, 0)


def program(column: int, arch: int) -> list[tuple[int, int, int, int]]:
    """The seccomp filter: (operation, jump if true, jump if false, operand) a step, as in seccomp(2)."""
    load, equal, at_least, any_bit, give = 0x20, 0x15, 0x35, 0x45, 0x06
    steps = [
        (load, 0, 0, 4),  # the kind of machine that the call is for
        (equal, 1, 0, arch),
        (give, 0, 0, KILL),
        (load, 0, 0, 0),  # the number of the call
        (at_least, 0, 1, 0x40000000),  # x86_64's second table
        (give, 0, 0, KILL),
    ]
    for numbers in DENIED.values():
        if (number := numbers[column]) is not None:
            steps += [(equal, 0, 1, number), (give, 0, 0, ERRNO | EPERM)]
    steps += [(equal, 0, 1, CLONE3[column]), (give, 0, 0, ERRNO | ENOSYS)]  # glibc then uses clone
    first_argument, second_argument = 16, 24
    for numbers_, values in DENIED_WITH.values():
        last = len(values)
        steps += [(equal, 0, last + 3, numbers_[column]), (load, 0, 0, second_argument)]
        steps += [(equal, last - i, 0, value) for i, value in enumerate(values)]
        steps += [(give, 0, 0, ALLOW), (give, 0, 0, ERRNO | EPERM)]
    steps += [
        (equal, 0, 4, CLONE[column]),
        (load, 0, 0, first_argument),
        (any_bit, 1, 0, CLONE_THREAD),  # a thread may start, a process may not
        (give, 0, 0, ERRNO | EPERM),
        (give, 0, 0, ALLOW),
        (equal, 0, 4, PRLIMIT[column]),
        (load, 0, 0, first_argument),
        (equal, 1, 0, 0),  # its own limits, not those of another process
        (give, 0, 0, ERRNO | EPERM),
        (give, 0, 0, ALLOW),
        (give, 0, 0, ALLOW),
    ]
    return steps


def _landlock_version() -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    return int(libc.syscall(LANDLOCK_CREATE, None, ctypes.c_size_t(0), 1))


def _landlock(libc: ctypes.CDLL, readable: Sequence[str], writable: Sequence[str]) -> None:
    """Every file right is handled, so it is denied wherever no rule gives it back."""
    version = _landlock_version()
    rights = (1 << RIGHTS_OF_VERSION.get(version, 16)) - 1
    attributes = struct.pack("Q", rights)
    if version >= 4:
        attributes += struct.pack("Q", 0b11)  # TCP: bind, connect
    if version >= 6:
        attributes += struct.pack("Q", 0b11)  # abstract sockets and signals stay inside
    rules = _call(libc, "syscall", LANDLOCK_CREATE, attributes, ctypes.c_size_t(len(attributes)), 0)
    try:
        for paths, given in ((readable, READ), (writable, rights)):
            for path in paths:
                _allow(libc, rules, path, given)
        _call(libc, "syscall", LANDLOCK_RESTRICT, rules, 0)
    finally:
        os.close(rules)


def _allow(libc: ctypes.CDLL, rules: int, path: str, rights: int) -> None:
    """Give the rights on a file, or on a folder and all below it; a path that is not there is skipped."""
    try:
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        if not os.path.isdir(path):
            rights &= 0b100000000000111  # those that a file can have: execute, write, read, truncate
        _call(libc, "syscall", LANDLOCK_ADD, rules, 1, struct.pack("=Qi", rights, handle), 0)
    finally:
        os.close(handle)


def _call(libc: ctypes.CDLL, name: str, *args: object) -> int:
    wide = [ctypes.c_ulong(a) if isinstance(a, int) else a for a in args]
    result = int(getattr(libc, name)(*wide))
    if result < 0:
        raise IsolationError(f"{name} {args[0]}: {os.strerror(ctypes.get_errno())}")
    return result
