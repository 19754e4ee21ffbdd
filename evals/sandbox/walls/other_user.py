"""Started as root and without namespaces: the program becomes a user that nobody else is.

As such it owns no file, may signal and look into no process, and limits per user bind it alone. Where no other id is
mapped (a container of one user), or root may not change its own, it stays root, without capabilities; Landlock and the
filter of system calls stand then alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import stat
from collections.abc import Iterable

# Far from any real user's.
FIRST_ID, IDS = 1 << 30, 1 << 28
PR_SET_KEEPCAPS, CAPABILITY_VERSION = 8, 0x20080522
DAC_OVERRIDE, DAC_READ_SEARCH = 1 << 1, 1 << 2
# CHOWN, FOWNER, SETGID, SETUID.
NEEDED = DAC_OVERRIDE | 1 << 0 | 1 << 3 | 1 << 6 | 1 << 7

libc = ctypes.CDLL(None, use_errno=True)


def choose_id() -> int | None:
    """Choose an id for one program, from those that the user namespace maps.

    None: none can be had, or it cannot be cleaned up after its user.
    """
    if read_capabilities() & NEEDED != NEEDED:
        return None
    wanted = FIRST_ID + secrets.randbelow(IDS)
    ranges = [(0, 1 << 32)]
    with contextlib.suppress(OSError, ValueError), open("/proc/self/uid_map", encoding="ascii") as file:
        ranges = [(int(line.split()[0]), int(line.split()[2])) for line in file]
    if any(first <= wanted < first + count for first, count in ranges):
        return wanted
    first, count = max(ranges, key=lambda item: item[1])
    # The upper half of a container's ids: users are numbered from below, and the last two are nobody's and invalid.
    return first + count // 2 + secrets.randbelow(count // 2 - 2) if count > 1 << 10 else None


def read_capabilities() -> int:
    """Read this process's effective capabilities, as the kernel's bit mask."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        return next(int(line.split()[1], 16) for line in file if line.startswith("CapEff:"))


def find_reading_capability() -> int:
    """Find the least capability that lets another user read what only root may.

    Most containers have but the greater one.
    """
    return DAC_READ_SEARCH if read_capabilities() & DAC_READ_SEARCH else DAC_OVERRIDE


def change_user(user: int, folder: str) -> bool:
    """Become the user, the owner of `folder`, for good, and return whether it worked.

    Capabilities stay permitted, none is in effect.
    """
    owner = os.stat(folder)
    try:
        os.chown(folder, user, user)
        os.setgroups([])
        call("prctl", PR_SET_KEEPCAPS, 1, 0, 0, 0)
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    except OSError:
        with contextlib.suppress(OSError):
            os.chown(folder, owner.st_uid, owner.st_gid)
        return False
    return True


def set_capabilities(mask: int) -> None:
    """Keep these capabilities and no others, for good (the filter refuses to gain any by another program).

    Raises:
        OSError: they cannot be had.
    """
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
    call("capset", header, (ctypes.c_uint32 * 6)(mask, mask, 0, 0, 0, 0))


def is_open_to_others(path: str) -> bool:
    """Whether a user without rights of its own may read what is there."""
    path = os.path.realpath(path)
    mode = os.stat(path).st_mode
    if not mode & stat.S_IROTH or (stat.S_ISDIR(mode) and not mode & stat.S_IXOTH):
        return False
    return all(os.stat(folder).st_mode & stat.S_IXOTH for folder in _list_parents(path))


def _list_parents(path: str) -> Iterable[str]:
    while path != "/":
        path = os.path.dirname(path)
        yield path


def call(name: str, *args: object) -> None:
    """Call one of the C library's functions. Raises OSError."""
    if getattr(libc, name)(*args) == -1:
        raise OSError(f"{name}: {os.strerror(ctypes.get_errno())}")
