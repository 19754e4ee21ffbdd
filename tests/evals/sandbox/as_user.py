"""Run a command as someone else: `python as_user.py USER command …`, as root.

USER is "ordinary", without privileges; or "container-root" or "container-user", in what a container leaves of root's
capabilities and of the kernel: neither may make a namespace or mount anything; or "old-container-user", who has no
Landlock either.

The interpreter or the repository may lie in a folder that only root may enter (/root): in a mount namespace of its own,
such a folder is replaced by an empty one with nothing but what the command needs.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import stat
import struct
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
NOBODY = 65534
NEWNS, MS_BIND, MS_REC, MS_PRIVATE = 0x20000, 0x1000, 0x4000, 1 << 18
# What Docker leaves: CHOWN, DAC_OVERRIDE, FOWNER, FSETID, KILL, SETGID, SETUID, SETPCAP, NET_BIND_SERVICE, NET_RAW,
# SYS_CHROOT, MKNOD, AUDIT_WRITE, SETFCAP.
CONTAINER, CAPABILITIES = (0, 1, 3, 4, 5, 6, 7, 8, 10, 13, 18, 27, 29, 31), 64
PR_CAPBSET_DROP, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 24, 22, 2
LANDLOCK = (444, 445, 446)
# unshare, setns, mount, pivot_root, clone, clone3.
NUMBERS = {"x86_64": (272, 308, 165, 155, 56, 435), "aarch64": (97, 268, 40, 41, 220, 435)}
ANY_NAMESPACE = 0x7E020000
libc = ctypes.CDLL(None, use_errno=True)


def find_closed(path: Path) -> Path | None:
    """The first folder on the way to a path that others may not enter."""
    closed = (folder for folder in [*reversed(path.parents), path] if not folder.stat().st_mode & stat.S_IXOTH)
    return next(closed, None)


def open_up(paths: list[Path]) -> None:
    """Make the paths reachable for everyone, in a mount namespace of this process's own.

    Raises:
        OSError: that cannot be had.
    """
    blocked = {path: folder for path in paths if (folder := find_closed(path))}
    if not blocked:
        return
    call("unshare", NEWNS)
    call("mount", None, b"/", None, ctypes.c_ulong(MS_REC | MS_PRIVATE), None)
    opened = {path: os.open(path, os.O_PATH) for path in blocked}
    for folder in sorted(set(blocked.values())):
        call("mount", b"tmpfs", os.fsencode(folder), b"tmpfs", ctypes.c_ulong(0), b"mode=755")
    for path, fd in opened.items():
        path.mkdir(parents=True, exist_ok=True)
        source = f"/proc/self/fd/{fd}".encode()
        call("mount", source, os.fsencode(path), None, ctypes.c_ulong(MS_BIND | MS_REC), None)
        os.close(fd)


def refuse_namespaces(others: tuple[int, ...]) -> None:
    """From now on, and for every process that is started, as in most containers; and `others`."""
    *numbers, clone, clone3 = NUMBERS[platform.machine()]
    refuse, missing = (0x06, 0, 0, 0x00050000 | errno.EPERM), (0x06, 0, 0, 0x00050000 | errno.ENOSYS)
    code = [(0x20, 0, 0, 0)]
    for number in (*numbers, *others):
        code += [(0x15, 0, 1, number), refuse]
    code += [(0x15, 0, 1, clone3), missing]
    code += [(0x15, 0, 3, clone), (0x20, 0, 0, 16), (0x45, 0, 1, ANY_NAMESPACE), refuse, (0x06, 0, 0, 0x7FFF0000)]
    buffer = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *each) for each in code))
    program = struct.pack("HxxxxxxP", len(code), ctypes.addressof(buffer))
    call("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0)


def drop_capabilities() -> None:
    """What the command will not have, even as root."""
    for capability in set(range(CAPABILITIES)) - set(CONTAINER):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)


def call(name: str, *args: object) -> None:
    """A function of the C library.

    Raises:
        OSError: it says -1.
    """
    if getattr(libc, name)(*args) == -1:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


def main() -> None:
    """argv: who, and the command."""
    user, command = sys.argv[1], sys.argv[2:]
    if user != "container-root":
        needed = {Path(prefix).resolve() for prefix in (sys.base_prefix, sys.base_exec_prefix, sys.prefix, ROOT)}
        open_up(sorted(needed))
    os.chdir("/")
    if "container" in user:
        refuse_namespaces(LANDLOCK if user.startswith("old") else ())
        drop_capabilities()
    if user != "container-root":
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
