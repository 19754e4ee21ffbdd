"""A folder that holds one measurement's parts, so that the same command can continue it and no other one can."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from laguna_serve.serving.kit.errors import CommandError
from laguna_serve.serving.kit.files import expand, hash_file, is_no_file, write_text

NOTE = "settings.sha256"
# Linux's list of locks and who holds them: "1: FLOCK  ADVISORY  WRITE 4242 08:01:1234 0 EOF".
LOCKS = Path("/proc/locks")


class HasOut(Protocol):
    """A configuration whose files go to `out`; None: there are none."""

    @property
    def out(self) -> Path | None:
        """The folder for results."""


C = TypeVar("C", bound=HasOut)
P = ParamSpec("P")
R = TypeVar("R")


class RunDirError(CommandError):
    """A folder with the parts of another measurement; one line."""


def check_out(folder: Path, flag: str = "--out") -> None:
    """Refuse what cannot become a folder for results; nothing is made yet. `flag` named it.

    Raises:
        RunDirError: a file is in its place or above it, or it may not be written to.
    """
    above = next((path for path in (folder, *folder.absolute().parents) if path.exists()), Path())
    if not above.is_dir():
        raise RunDirError(f"{flag} {folder}: expected a folder, got the file {above}; choose another")
    if not os.access(above, os.W_OK | os.X_OK):
        raise RunDirError(
            f"{flag} {folder}: expected a folder to write to, got {above}, which is closed; choose another"
        )


def make_out(folder: Path, flag: str = "--out") -> None:
    """Make the folder for results, and those above it. `flag` named it.

    Raises:
        RunDirError: `check_out` refuses it, or the system does.
    """
    check_out(folder, flag)
    _make_folder(folder, f"{flag} {folder}")


def check_out_file(file: Path, flag: str = "--out") -> None:
    """Refuse what cannot become a file for results; the folders above it are made. A device or a pipe will do.

    Raises:
        RunDirError: a folder is in its place, or there can be none above it.
    """
    if is_no_file(file):
        return
    if file.is_dir():
        raise RunDirError(f"{flag} {file}: expected a file, got a folder; name a file in it")
    make_out(file.parent, flag)


def claim_folder(folder: Path, settings: Mapping[str, object], *, alone: bool = False) -> None:
    """Make the folder and note what its parts were measured with (JSON values).

    alone: whoever calls holds it (`hold_folder`): one that was begun with other settings and has no parts is taken.

    Raises:
        RunDirError: it holds the parts of another measurement, or is a file.
        WriteError: the note cannot be written; one that is there is left as it is.
    """
    digest = hashlib.sha256(json.dumps(dict(settings), sort_keys=True).encode()).hexdigest()
    noted = folder / NOTE
    if noted.exists() and not (alone and all(path == noted for path in folder.rglob("*") if path.is_file())):
        if noted.read_bytes() != digest.encode():
            expected = "the parts of this measurement"
            raise RunDirError(f"{folder}: expected {expected}, got another one's; choose another --out or remove it")
        return
    _make_folder(folder)
    write_text(noted, digest)


@contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Make the folder and keep a second run out, whose files would have the same names.

    A process that ends takes its lock with it. Folders that were made for it and are empty at the end are removed.

    Raises:
        RunDirError: another one holds it, or a file is in its place.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    _make_folder(folder)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = _find_holder(descriptor)
        os.close(descriptor)
        who = "" if holder is None else f" (process {holder})"
        raise RunDirError(f"{folder}: expected to write alone, got another run at it{who}; wait for its end") from None
    except OSError:
        pass  # a file system without locks
    try:
        yield
    finally:
        with suppress(OSError):  # it has files
            for path in made:
                path.rmdir()
        os.close(descriptor)


@contextmanager
def hold_folders(*folders: Path) -> Iterator[None]:
    """Hold several folders as `hold_folder`, one that is named twice once. Raises RunDirError."""
    with ExitStack() as held:
        for folder in {folder.resolve(): folder for folder in folders}.values():
            held.enter_context(hold_folder(folder))
        yield


def hold_out(act: Callable[Concatenate[C, P], R]) -> Callable[Concatenate[C, P], R]:
    """Make a function hold its configuration's `out` (`hold_folder`) from its first line to its last.

    Raises:
        RunDirError: another run holds it, or it can be no folder (`check_out`).
    """

    @wraps(act)
    def act_alone(config: C, /, *args: P.args, **kwargs: P.kwargs) -> R:
        if config.out is None:
            return act(config, *args, **kwargs)
        check_out(config.out)
        with hold_folder(config.out):
            return act(config, *args, **kwargs)

    return act_alone


def claim_work(work: Path, out: Path, settings: Mapping[str, object]) -> None:
    """Claim a folder that is removed when the result is in `out`.

    Raises:
        RunDirError: it has `out` in it, holds others' files, or the parts of another run.
        WriteError: see `claim_folder`.
    """
    if work.resolve() in (out.resolve(), *out.resolve().parents):
        expected = "expected a folder that can be removed"
        raise RunDirError(f"--work {work}: {expected}, got one with --out in it; choose another")
    require_removable(work)
    claim_folder(work, settings)


def require_removable(folder: Path, note: str = NOTE) -> None:
    """Refuse a folder that is to be removed and has files, but not the note of whoever began it.

    Raises:
        RunDirError: nobody said that its files may go.
    """
    if folder.is_dir() and not (folder / note).exists() and any(folder.iterdir()):
        expected = "expected an empty folder or one that this command began, as it is removed"
        raise RunDirError(f"--work {folder}: {expected}, got one with other files; choose another")


def is_begun(folder: Path) -> bool:
    """Say whether a measurement has been begun there.

    What can be refused before engines start was looked at then, and nothing may be left to start.
    """
    return (folder / NOTE).exists()


def fingerprint(path: str) -> str:
    """SHA-256 of a file, or of a checkpoint folder's config and the sizes and times of its weights; "" for a name."""
    found = expand(path)
    if found.is_file():
        return hash_file(found)
    if not found.is_dir():
        return ""
    parts = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(found.iterdir()) if p.is_file()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _make_folder(folder: Path, subject: str | None = None) -> None:
    subject = subject or str(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise RunDirError(f"{subject}: expected a folder, got a file in its place; choose another --out") from None
    except OSError as error:
        expected = f"expected a folder that can be made, got {error.strerror or error}"
        raise RunDirError(f"{subject}: {expected}; choose another") from None


def _find_holder(descriptor: int) -> int | None:
    """Find the process that has locked a folder, where the system says it."""
    found = os.fstat(descriptor)
    place = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    with suppress(OSError):
        locks = [line.split() for line in LOCKS.read_text(encoding="ascii").splitlines()]
        holders = [int(lock[4]) for lock in locks if lock[1] == "FLOCK" and lock[5] == place]
        return next((holder for holder in holders if holder > 0), None)  # 0: of another container
    return None
