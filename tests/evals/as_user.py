"""Run a command as a user without privileges: `python as_user.py UID command …`, as root.

The interpreter or the repository may lie in a folder that only root may enter (/root): in a mount namespace of its own,
such a folder is replaced by an empty one with nothing but what the command needs.
"""

from __future__ import annotations

import ctypes
import os
import stat
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NEWNS, MS_BIND, MS_REC, MS_PRIVATE = 0x20000, 0x1000, 0x4000, 1 << 18
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


def call(name: str, *args: object) -> None:
    if getattr(libc, name)(*args) == -1:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")


def main() -> None:
    uid, command = int(sys.argv[1]), sys.argv[2:]
    needed = {Path(prefix).resolve() for prefix in (sys.base_prefix, sys.base_exec_prefix, sys.prefix, ROOT)}
    open_up(sorted(needed))
    os.chdir("/")
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
