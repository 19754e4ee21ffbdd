"""The folder that a program may write into where no namespace gives it one in memory: bounded, and surely removed.

No mount bounds it, so that it is measured while the program runs, which ends when there is too much. A program can make
trees deeper than a recursion, paths longer than the system takes, and folders that nobody may enter; all of it goes.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import stat
import tempfile
from collections.abc import Iterator

MAX_ENTRIES, MAX_DEPTH = 512, 32
# Files without a name are not seen in the folder, and a program may hold many: so many times its limit may vanish from
# the file system, where others write too, before a program that has used its folder is held to have taken it.
UNSEEN_SHARE = 32
BLOCK_BYTES = 512
FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class Scratch:
    """A folder and how many bytes it may hold."""

    def __init__(self, path: str, limit_bytes: int) -> None:
        self.path, self.limit_bytes = path, limit_bytes
        self._changed = os.stat(path).st_mtime_ns
        self._free_bytes = _measure_free(path)

    def find_excess(self) -> str | None:
        """Find what there is too much of, or None. May run while the program writes: what vanishes is not counted."""
        entries = size = 0
        levels = [_Level(self.path, None)]
        try:
            while levels:
                each = next(levels[-1].entries, None)
                if each is None:
                    levels.pop().close()
                    continue
                entries += 1
                if entries > MAX_ENTRIES:
                    return f"expected at most {MAX_ENTRIES} files and folders, got more"
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    size += each.stat(follow_symlinks=False).st_blocks * BLOCK_BYTES
                    if each.is_dir(follow_symlinks=False):
                        if len(levels) > MAX_DEPTH:
                            return f"expected folders at most {MAX_DEPTH} deep, got more"
                        levels.append(_Level(each.name, levels[-1].fd))
        finally:
            for level in levels:
                level.close()
        if size <= self.limit_bytes and os.stat(self.path).st_mtime_ns != self._changed:
            size = max(size, (self._free_bytes - _measure_free(self.path)) // UNSEEN_SHARE)
        return None if size <= self.limit_bytes else f"expected at most {self.limit_bytes} bytes in files, got {size}"


class _Level:
    """A folder that is being looked through."""

    def __init__(self, name: str, parent: int | None) -> None:
        self.fd = _open(name, parent)
        self.entries = os.scandir(self.fd)

    def close(self) -> None:
        """Close the folder and its listing."""
        self.entries.close()
        os.close(self.fd)


def _measure_free(path: str) -> int:
    system = os.statvfs(path)
    return system.f_bfree * system.f_frsize


@contextlib.contextmanager
def make_scratch(limit_bytes: int) -> Iterator[Scratch]:
    """Make a new folder, gone with all that is in it at the end."""
    path = tempfile.mkdtemp(prefix="jail-")
    try:
        yield Scratch(path, limit_bytes)
    finally:
        remove_tree(path)


def remove_tree(path: str) -> None:
    """Remove a folder of any shape, following no link: what its folders hold is moved up until none holds anything.

    Takes a number of steps in proportion to what is there, two descriptors, no recursion and no long path. Nobody may
    write there any more.
    """
    root = _open(path, None)
    numbers = itertools.count()
    try:
        while names := os.listdir(root):
            for name in names:
                if _is_folder(name, root):
                    _empty(name, root, numbers)
                    os.rmdir(name, dir_fd=root)
                else:
                    os.unlink(name, dir_fd=root)
    finally:
        os.close(root)
    os.rmdir(path)


def _empty(name: str, root: int, numbers: Iterator[int]) -> None:
    """Move a folder's folders up into `root`, and remove the rest of what it holds."""
    folder = _open(name, root)
    try:
        for each in os.listdir(folder):
            if not _is_folder(each, folder):
                os.unlink(each, dir_fd=folder)
                continue
            os.close(_open(each, folder))  # only who may write into a folder can move it
            os.rename(each, _find_free(root, numbers), src_dir_fd=folder, dst_dir_fd=root)
    finally:
        os.close(folder)


def _find_free(root: int, numbers: Iterator[int]) -> str:
    """Find a name that nothing in the folder has: a program may have taken any."""
    for number in numbers:
        name = f"moved-{number}"
        try:
            os.stat(name, dir_fd=root, follow_symlinks=False)
        except FileNotFoundError:
            return name
    raise AssertionError("unreachable: numbers do not end")


def _is_folder(name: str, parent: int) -> bool:
    return stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode)


def _open(name: str, parent: int | None) -> int:
    """Open a folder, after giving its owner back the right to."""
    # By way of a handle and not of the name, which could have become a link meanwhile.
    handle = os.open(name, os.O_PATH | FOLDER, dir_fd=parent)
    try:
        path = f"/proc/self/fd/{handle}"
        if os.fstat(handle).st_mode & stat.S_IRWXU != stat.S_IRWXU:
            os.chmod(path, stat.S_IRWXU)
        return os.open(path, FOLDER & ~os.O_NOFOLLOW)
    finally:
        os.close(handle)
