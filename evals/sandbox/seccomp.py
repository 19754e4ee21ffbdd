"""A system-call filter (seccomp) for model-written code: one process, no network, no signals to others.

It needs no privilege, so it holds where namespaces cannot be had, too. Refused (EPERM): starting processes (threads are
allowed), sockets other than a pair of one's own, signals to another process, memory outside of the address-space limit
(memfd, System V shared memory), new namespaces and mounts, tracing, keys, io_uring, bpf and their like.
Numbers of x86-64 and aarch64 are from Linux' syscall tables; https://docs.kernel.org/userspace-api/seccomp_filter.html.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct

# name: (x86-64, aarch64); None where the machine lacks the call.
DENIED: dict[str, tuple[int | None, int | None]] = {
    "fork": (57, None),
    "vfork": (58, None),
    "execve": (59, 221),
    "execveat": (322, 281),
    "socket": (41, 198),
    "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "pidfd_getfd": (438, 438),
    "setsid": (112, 157),
    "setpgid": (109, 154),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsmount": (432, 432),
    "mount_setattr": (442, 442),
    "open_by_handle_at": (304, 265),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "kcmp": (312, 272),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "personality": (135, 92),
}
CLONE, CLONE3 = (56, 220), (435, 435)
# The first argument must be this process (for prlimit64: or 0, which means the same).
KILL, TGKILL, PRLIMIT = (62, 129), (234, 131), (302, 261)
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
X32 = 0x40000000
CLONE_THREAD = 0x00010000
# Offsets in struct seccomp_data: number, architecture, low word of the first argument (both machines: little endian).
NUMBER, ARCH, ARGUMENT = 0, 4, 16
LOAD, JUMP, IF_EQUAL, IF_AT_LEAST, IF_SET, RETURN = 0x20, 0x05, 0x15, 0x35, 0x45, 0x06
ALLOW, KILL_PROCESS, REFUSE = 0x7FFF0000, 0x80000000, 0x00050000
PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2


class FilterError(OSError):
    """The kernel takes no filter, or the machine's numbers are not known."""


def install_filter(pid: int) -> None:
    """Put this process, whose id it sees as `pid`, under the filter for good.

    Raises:
        FilterError: it cannot be.
    """
    machine = platform.machine()
    if machine not in AUDIT_ARCH:
        raise FilterError(f"system-call filter: expected x86_64 or aarch64, got {machine}")
    libc = ctypes.CDLL(None, use_errno=True)
    code = build_filter(machine, pid)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0):
        raise FilterError(f"system-call filter: {os.strerror(ctypes.get_errno())}")


def build_filter(machine: str, pid: int) -> bytes:
    """The filter as BPF: a first part of plain refusals, then one block for each call whose argument decides."""
    column = list(AUDIT_ARCH).index(machine)
    refuse, allow = _pack(RETURN, REFUSE | errno.EPERM), _pack(RETURN, ALLOW)
    code = [
        _pack(LOAD, ARCH),
        _pack(IF_EQUAL, AUDIT_ARCH[machine], 1, 0),
        _pack(RETURN, KILL_PROCESS),
        _pack(LOAD, NUMBER),
        # The x32 numbers of x86-64 would be another way to the same calls.
        _pack(IF_AT_LEAST, X32, 0, 1),
        _pack(RETURN, KILL_PROCESS),
        # The C library falls back to clone, whose flags a filter can read.
        _pack(IF_EQUAL, CLONE3[column], 0, 1),
        _pack(RETURN, REFUSE | errno.ENOSYS),
    ]
    for numbers in DENIED.values():
        if (number := numbers[column]) is not None:
            code += [_pack(IF_EQUAL, number, 0, 1), refuse]
    code += [
        _pack(IF_EQUAL, CLONE[column], 0, 4),
        _pack(LOAD, ARGUMENT),
        _pack(IF_SET, CLONE_THREAD, 0, 1),
        allow,
        refuse,
    ]
    for numbers, own in ((KILL, (pid,)), (TGKILL, (pid,)), (PRLIMIT, (0, pid))):
        block = [_pack(IF_EQUAL, value, 0, 1) + allow for value in own]
        code += [_pack(IF_EQUAL, numbers[column], 0, 2 + 2 * len(own)), _pack(LOAD, ARGUMENT), *block, refuse]
    code.append(allow)
    return b"".join(code)


def _pack(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("HBBI", code, if_true, if_false, value)
