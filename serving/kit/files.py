"""Files that appear whole or not at all: written under another name, synced, renamed into place; and NumPy's, read."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from tokenize import TokenError
from typing import IO, TYPE_CHECKING, Any, BinaryIO
from zipfile import BadZipFile

if TYPE_CHECKING:
    import numpy.typing as npt

FULL = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))


class WriteError(OSError):
    """A file could not be written; one line that says which, why and what to do. Nothing is left of the attempt."""


def expand(name: str) -> Path:
    """Return the path of a name, whose ~ is a home; the home of somebody whom nobody knows stays as it is."""
    return Path(os.path.expanduser(name))


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file by `write`, which gets another path; then sync it and rename it to `path`.

    A file that was there leaves it its mode, and its owner and group where that is permitted. Devices and pipes are
    written to, and stay what they are.

    Raises:
        WriteError: the disk is full or refuses. Other errors of `write` than OSError, EOFError and those that say so
            pass.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        if is_no_file(path):
            write(path)
            return
        write(partial)
        _take_over(path, partial)
        _sync(partial)
        partial.replace(path)
        _sync(path.parent)
    except Exception as error:
        refused = _find_refusal(error)
        if refused is None and not isinstance(error, OSError | EOFError):
            raise
        raise explain_write(path, refused or error) from None
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def _take_over(path: Path, partial: Path) -> None:
    """Give a file the owner and the mode of the one whose place it takes; of none the process' own."""
    try:
        before = path.stat()
    except FileNotFoundError:
        partial.chmod(0o666 & ~_umask())  # safetensors makes files that nobody else may read
        return
    if (before.st_uid, before.st_gid) != (os.geteuid(), os.getegid()):
        with suppress(OSError):  # not permitted, or one whom this user namespace does not know
            os.chown(partial, before.st_uid, before.st_gid)
    partial.chmod(stat.S_IMODE(before.st_mode))


def write_stream(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write as `write_file` where `write` wants an open file, as np.save and torch.save take one. Raises WriteError."""

    def open_and_write(partial: Path) -> None:
        with partial.open("wb") as file:
            write(file)

    write_file(path, open_and_write)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8. Raises WriteError."""
    write_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Write a JSON object, one line per top-level key. Raises WriteError; ValueError for NaN, as JSON has none."""
    lines = [
        f"{json.dumps(key)}: {json.dumps(item, ensure_ascii=False, allow_nan=False)}" for key, item in value.items()
    ]
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


def load_array(file: Path | IO[bytes], *, mapped: bool = False) -> npt.NDArray[Any]:
    """Read the one array of a .npy file; `mapped`: leave it where it lies.

    Raises:
        OSError: there is no file, or it cannot be read.
        ValueError: it is no array, or only the beginning of one; NumPy has five kinds of error for that.
    """
    import numpy as np  # not where nothing is read

    try:
        array = np.load(file, mmap_mode="r" if mapped else None, allow_pickle=False)
    except (EOFError, MemoryError, BadZipFile, TokenError) as error:
        raise ValueError(str(error)) from error
    if not isinstance(array, np.ndarray):
        raise ValueError("an archive of arrays")
    return array


def number_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Read the lines of a UTF-8 text that are not blank, with their numbers; a mark of the encoding is passed over.

    U+2028 and its like, which a JSON string may have in it, end no line, as they do for `str.splitlines`.

    Raises:
        OSError, UnicodeDecodeError: when what cannot be read is come to.
    """
    with path.open(encoding="utf-8-sig") as file:
        yield from ((number, line.rstrip("\n")) for number, line in enumerate(file, 1) if line.strip())


def hash_file(path: Path) -> str:
    """SHA-256 of a file, which may have more bytes than there is memory. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_whole(text: str) -> bool:
    """Say whether a text can be written as UTF-8: JSON also has halves of surrogate pairs, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_no_file(path: Path) -> bool:
    """Whether something is there that a file may not take the place of: /dev/stdout also where it leads to a file."""
    return path.exists() and not path.is_dir() and (not path.is_file() or path.absolute().parent == Path("/dev"))


def is_disk_full(error: BaseException) -> bool:
    """Say whether no room, or no quota, is left, or a file may not grow; also as safetensors' Rust side says it."""
    return (isinstance(error, OSError) and error.errno in FULL) or any(f"os error {n})" in str(error) for n in FULL)


def _find_refusal(error: BaseException) -> Exception | None:
    """Find the error of a full disk, also behind what a library says in its place, as torch does at a file's end."""
    found: BaseException | None = error
    while found is not None and not is_disk_full(found):
        found = found.__context__
    return found if isinstance(found, Exception) else None


def explain_write(path: Path | None, error: Exception) -> WriteError:
    """Make one line of why a file, if it is known, was not written."""
    subject = "output" if path is None else str(path)
    if is_disk_full(error):
        return WriteError(f"{subject}: expected to write it, got no space left; free some and repeat the command")
    reason = error.strerror if isinstance(error, OSError) and error.strerror else f"{type(error).__name__}: {error}"
    return WriteError(f"{subject}: expected to write it, got {reason}")


def explain_read(error: OSError | ValueError) -> str:
    """End a message about a text that could not be read: what was there in its place, and what to do."""
    if isinstance(error, FileNotFoundError):
        return "got none; check the path"
    if isinstance(error, OSError):
        return f"got {error.strerror or error}; check the path"
    if isinstance(error, UnicodeDecodeError):
        return f"got bytes that are no UTF-8 (the first is number {error.start}); name another, or re-encode it"
    return f"got {error}; fix it"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
