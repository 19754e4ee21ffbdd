"""A system-call filter (seccomp) for model-written code: what a computation in one process needs, and nothing else.

An allow-list: a call that is not named is refused (EPERM; those newer than Linux 5.1: ENOSYS, upon which the C library
falls back to older ones). So there is no second process, no network, no signal or priority of another process, no
memory outside of the address-space limit, no tracing, keys, queues, mounts, io_uring, bpf. Where an argument decides,
it is looked at: signals go to the process itself alone, also by way of a file's owner (F_SETOWN, F_NOTIFY, leases);
sockets are connected pairs, and what is sent takes no address; an `ioctl` asks, and sets nothing on a device.

It needs no privilege. Where the program sees the user's files (no namespaces), it must not change their modes, owners,
times and attributes either: Landlock has no say in that.
Which calls: system_calls.py; https://docs.kernel.org/userspace-api/seccomp_filter.html.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Iterable

from laguna_serve.evals.sandbox.walls.system_calls import ALLOWED, ATTRIBUTES, OWN, OWN_OR_ZERO

# Which argument must have one of which values.
# F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, locks, F_GETOWN, F_OFD_*, F_DUPFD_CLOEXEC, F_GETPIPE_SZ, F_GET_SEALS.
FCNTL = (0, 1, 2, 3, 4, 5, 6, 7, 9, 36, 37, 38, 1030, 1032, 1034)
# TCGETS (isatty), TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX.
IOCTL = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
# PR_GET_DUMPABLE, PR_SET_NAME, PR_GET_NAME, PR_GET_SECCOMP, PR_CAPBSET_READ, PR_GET_NO_NEW_PRIVS, PR_SET_VMA.
PRCTL = (3, 15, 16, 21, 23, 39, 0x53564D41)
CHOSEN: dict[str, tuple[tuple[int | None, int | None], int, tuple[int, ...]]] = {
    "fcntl": ((72, 25), 1, FCNTL),
    "ioctl": ((16, 29), 1, IOCTL),
    "prctl": ((157, 167), 0, PRCTL),
}
CLONE, CLONE3, SOCKETPAIR, SENDTO, OPEN, OPENAT = (56, 220), (435, 435), (53, 199), (44, 206), (2, None), (257, 56)
CLONE_THREAD, AF_UNIX, SOCK_STREAM, SOCK_TYPE, MSG_OOB = 0x00010000, 1, 1, 0xF, 1
# Opening neither for reading nor for writing (3) is no access to Landlock; truncating a file opened for reading is one
# that it knows only since its third version.
O_ACCMODE, O_TRUNC = 0o3, 0o1000
TRUNCATES = O_ACCMODE | O_TRUNC
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
X32 = 0x40000000
# From here on numbers are those of calls that are newer than Linux 5.1.
FIRST_NEW = 424
# Offsets in struct seccomp_data: number, architecture, low word of the first argument (both machines: little endian).
NUMBER, ARCH, ARGUMENT = 0, 4, 16
LOAD, AND, JUMP, IF_EQUAL, IF_AT_LEAST, IF_SET, RETURN = 0x20, 0x54, 0x05, 0x15, 0x35, 0x45, 0x06
ALLOW, KILL_PROCESS, REFUSE = 0x7FFF0000, 0x80000000, 0x00050000
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
INSTRUCTION, FULL, HIGH = 8, 0xFFFFFFFF, 4


def _pack(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("HBBI", code, if_true, if_false, value)


PERMIT, DENY, LACK = _pack(RETURN, ALLOW), _pack(RETURN, REFUSE | errno.EPERM), _pack(RETURN, REFUSE | errno.ENOSYS)


class FilterError(OSError):
    """The kernel takes no filter, or the machine's numbers are not known."""


def install_filter(pid: int, own_files: bool = True) -> None:
    """Put this process, whose id it sees as `pid`, under the filter for good. `own_files`: it sees no one else's.

    Raises:
        FilterError: it cannot be.
    """
    machine = platform.machine()
    if machine not in AUDIT_ARCH:
        raise FilterError(f"system-call filter: expected x86_64 or aarch64, got {machine}")
    libc = ctypes.CDLL(None, use_errno=True)
    code = build_filter(machine, pid, own_files)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HxxxxxxP", len(code) // INSTRUCTION, ctypes.addressof(buffer))
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0):
        raise FilterError(f"system-call filter: {os.strerror(ctypes.get_errno())}")


def build_filter(machine: str, pid: int, own_files: bool) -> bytes:
    """Build the filter as BPF: a search for the call's number, at whose end is what becomes of it."""
    column = list(AUDIT_ARCH).index(machine)
    bodies: dict[int, bytes] = {}

    def add(numbers: tuple[int | None, int | None], *body: bytes) -> None:
        if (number := numbers[column]) is not None:
            bodies[number] = b"".join(body)

    for numbers in (ALLOWED | (ATTRIBUTES if own_files else {})).values():
        add(numbers, PERMIT)
    for numbers in OWN.values():
        add(numbers, _one_of(0, (pid,)))
    for numbers in OWN_OR_ZERO.values():
        add(numbers, _one_of(0, (0, pid)))
    for numbers, argument, values in CHOSEN.values():
        add(numbers, _one_of(argument, values))
    add(CLONE, _deny_unless_set(0, CLONE_THREAD), PERMIT)
    # A pair of datagram sockets would take an address at any time.
    add(SOCKETPAIR, _deny_unless_equal(0, AF_UNIX), _deny_unless_equal(1, SOCK_STREAM, SOCK_TYPE), PERMIT)
    without_address = _deny_unless_equal(4, 0) + _deny_unless_equal(4, 0, word=HIGH)
    add(SENDTO, without_address, _deny_unless_equal(3, 0, MSG_OOB), PERMIT)
    for numbers, argument in ((OPEN, 1), (OPENAT, 2)):
        refusals = [_deny_if_equal(argument, O_ACCMODE, O_ACCMODE), _deny_if_equal(argument, O_TRUNC, TRUNCATES)]
        add(numbers, *refusals, PERMIT)
    add(CLONE3, LACK)  # clone is taken instead, whose flags a filter can read
    return b"".join(
        [
            _pack(LOAD, ARCH),
            _pack(IF_EQUAL, AUDIT_ARCH[machine], 1, 0),
            _pack(RETURN, KILL_PROCESS),
            _pack(LOAD, NUMBER),
            _search(_list_ranges(bodies)),
        ]
    )


def _list_ranges(bodies: dict[int, bytes]) -> list[tuple[int, bytes]]:
    """List what becomes of every number: the first ones of ranges, and the code for a range."""
    ranges: list[tuple[int, bytes]] = []
    for number in range(max(FIRST_NEW, *bodies) + 2):
        body = bodies.get(number, DENY if number < FIRST_NEW else LACK)
        if not ranges or ranges[-1][1] != body:
            ranges.append((number, body))
    # The x32 numbers of x86-64 would be another way to the same calls.
    return [*ranges, (X32, _pack(RETURN, KILL_PROCESS))]


def _search(ranges: list[tuple[int, bytes]]) -> bytes:
    """Build a binary search.

    The kernel also walks it once for every number that there is, as it remembers the result.
    """
    if len(ranges) == 1:
        return ranges[0][1]
    middle = len(ranges) // 2
    left, right = _search(ranges[:middle]), _search(ranges[middle:])
    return _pack(IF_AT_LEAST, ranges[middle][0], 0, 1) + _pack(JUMP, len(left) // INSTRUCTION) + left + right


def _one_of(argument: int, values: Iterable[int]) -> bytes:
    """Permit where the argument is one of the values."""
    tests = [_pack(IF_EQUAL, value, 0, 1) + PERMIT for value in values]
    return b"".join((_pack(LOAD, ARGUMENT + 8 * argument), *tests, DENY))


def _deny_if_equal(argument: int, value: int, mask: int = FULL) -> bytes:
    """Deny where the masked argument is the value."""
    return _pack(LOAD, ARGUMENT + 8 * argument) + _pack(AND, mask) + _pack(IF_EQUAL, value, 0, 1) + DENY


def _deny_unless_equal(argument: int, value: int, mask: int = FULL, word: int = 0) -> bytes:
    load = _pack(LOAD, ARGUMENT + 8 * argument + word)
    return load + _pack(AND, mask) + _pack(IF_EQUAL, value, 1, 0) + DENY


def _deny_unless_set(argument: int, flag: int) -> bytes:
    return _pack(LOAD, ARGUMENT + 8 * argument) + _pack(IF_SET, flag, 1, 0) + DENY
