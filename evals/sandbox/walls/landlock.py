"""Landlock: which files this process may open, from now on and for good; needs no privilege (Linux ≥ 5.13).

Besides, what the kernel's version of it has: no network (≥ 6.7), no device commands (≥ 6.10), no signals to and no
abstract sockets of processes outside (≥ 6.12). A process inside cannot look into one outside by way of ptrace or /proc.
What it does not restrict: finding out that a file exists, and its mode, owner, times and attributes; the filter of
system calls keeps them as they are. https://docs.kernel.org/userspace-api/landlock.html
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from collections.abc import Iterable

SYS_CREATE_RULESET, SYS_ADD_RULE, SYS_RESTRICT_SELF = 444, 445, 446
CREATE_RULESET_VERSION, RULE_PATH_BENEATH, PR_SET_NO_NEW_PRIVS = 1, 1, 38
WRITE_FILE, READ_FILE, READ_DIR, REMOVE_DIR, REMOVE_FILE = 1 << 1, 1 << 2, 1 << 3, 1 << 4, 1 << 5
MAKE_DIR, MAKE_REG, MAKE_FIFO, MAKE_SYM, REFER, TRUNCATE = 1 << 7, 1 << 8, 1 << 10, 1 << 12, 1 << 13, 1 << 14
READ, LIST = READ_FILE | READ_DIR, READ_DIR
WRITE = READ | WRITE_FILE | REMOVE_DIR | REMOVE_FILE | MAKE_DIR | MAKE_REG | MAKE_FIFO | MAKE_SYM | REFER | TRUNCATE
OF_A_FILE = WRITE_FILE | READ_FILE | TRUNCATE
# By version: how many kinds of access it knows, the first of them being the lowest bits.
KINDS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
BIND_AND_CONNECT_TCP, ABSTRACT_SOCKETS_AND_SIGNALS = 3, 3
NETWORK_SINCE, SCOPES_SINCE = 4, 6

libc = ctypes.CDLL(None, use_errno=True)


def find_version() -> int:
    """Find the kernel's version of Landlock; 0: it has none, or it is not enabled."""
    return max(0, int(libc.syscall(SYS_CREATE_RULESET, None, ctypes.c_size_t(0), CREATE_RULESET_VERSION)))


class Ruleset:
    """Rules that are collected, then enforced: what none of them grants is refused."""

    def __init__(self, version: int) -> None:
        """`version`: of Landlock, at most the kernel's; what later ones restrict is left alone.

        Raises:
            OSError: the kernel has none.
        """
        self._handled = (1 << KINDS[min(version, max(KINDS))]) - 1
        words = [self._handled]
        words += [BIND_AND_CONNECT_TCP] if version >= NETWORK_SINCE else []
        words += [ABSTRACT_SOCKETS_AND_SIGNALS] if version >= SCOPES_SINCE else []
        attributes = struct.pack(f"{len(words)}Q", *words)
        self._fd = _call(SYS_CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)

    def allow(self, path: str, access: int) -> None:
        """Grant access to a file, or to a folder and everything beneath it.

        Raises:
            OSError: there is none.
        """
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            if not stat.S_ISDIR(os.fstat(fd).st_mode):
                access &= OF_A_FILE
            _call(SYS_ADD_RULE, self._fd, RULE_PATH_BENEATH, struct.pack("=Qi", access & self._handled, fd), 0)
        finally:
            os.close(fd)

    def allow_except(self, root: str, hidden: Iterable[str]) -> None:
        """Grant reading of a folder but for some of those in it, whose names alone can be listed."""
        closed = {os.path.realpath(path) for path in hidden}
        closed = {path for path in closed if path.startswith(root + "/")}
        # The folders on the way to them: of each, everything else is granted.
        divided: set[str] = set()
        for path in closed:
            while path != root:
                path = os.path.dirname(path)
                divided.add(path)
        pending = [root]
        while pending:
            path = pending.pop()
            if path not in divided:
                self.allow(path, READ)
                continue
            self.allow(path, LIST)
            with os.scandir(path) as entries:
                # A link is followed by the kernel to what it names, whose own rule counts.
                pending += [each.path for each in entries if each.path not in closed and not each.is_symlink()]

    def enforce(self) -> None:
        """Restrict this process.

        Raises:
            OSError: it cannot be.
        """
        if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
            raise OSError(f"no new privileges: {os.strerror(ctypes.get_errno())}")
        _call(SYS_RESTRICT_SELF, self._fd, 0)
        os.close(self._fd)


def _call(number: int, *args: object) -> int:
    result = int(libc.syscall(number, *args))
    if result == -1:
        raise OSError(f"landlock: {os.strerror(ctypes.get_errno())}")
    return result
