"""Compilers and the cache of what they make, for kernels in C++ that are built on the machine that runs them."""

from __future__ import annotations

import atexit
import fcntl
import functools
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

COMPILERS = ("g++", "clang++", "c++")
COMPILE_LIMIT_S = 300


class BuildError(RuntimeError):
    """The library could not be built or loaded, as one line."""


@dataclass(frozen=True, slots=True)
class Compiler:
    """`command`: what is in CXX, a compiler cache perhaps before the compiler."""

    command: tuple[str, ...]
    version: str


def find_compiler() -> Compiler:
    """Find what CXX names, or else the first of the usual compilers.

    Raises:
        BuildError: there is none.
    """
    named = shlex.split(os.environ.get("CXX", ""))
    command = named or [name for name in COMPILERS if shutil.which(name)][:1]
    if not command or any(shutil.which(word) is None for word in command if not word.startswith("-")):
        got = f"CXX={shlex.join(named)!r}" if named else "none"
        raise BuildError(f"expected a C++ compiler, got {got}; install g++ or name one in CXX")
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=False)
    return Compiler(tuple(command), done.stdout)


def keep_library(name: str, compile_to: Callable[[Path], object]) -> Path:
    """Keep the library of this name in the cache, compiled unless it is there; who wants it meanwhile waits for it.

    Raises:
        BuildError: what `compile_to`, given a path to make it at, raises.
        OSError: neither the cache nor a temporary folder can be written.
    """
    library = find_cache() / name
    if is_ours(library):
        return library
    with hold_lock(library.with_suffix(".lock")):
        if not is_ours(library):
            with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
                made = Path(scratch) / name
                compile_to(made)
                made.replace(library)
    return library


def keep_compiled(name: str, source: Path, flags: Sequence[str], *libraries: str, headers: Sequence[Path] = ()) -> Path:
    """Keep a library that is made of one file, under a name that changes with files, compiler, flags and torch.

    Raises:
        BuildError: no compiler, or it failed.
        OSError: neither the cache nor a temporary folder can be written.
    """
    compiler = find_compiler()
    texts = [file.read_text(encoding="utf-8") for file in (source, *headers)]
    parts = (*texts, *compiler.command, compiler.version, *flags, platform.machine())
    key = hashlib.sha256("\n".join((*parts, metadata.version("torch"))).encode()).hexdigest()[:16]

    def compile_to(made: Path) -> None:
        run_compiler([*compiler.command, *flags, "-o", str(made), str(source), *libraries], source.name)

    return keep_library(f"{name}-{key}.so", compile_to)


@functools.cache
def _find_temporary() -> Path:
    folder, maker = Path(tempfile.mkdtemp(prefix="laguna-kernels-")), os.getpid()

    def remove() -> None:
        if os.getpid() == maker:  # and not a process that was forked from it
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder


def find_cache() -> Path:
    """Find the user's cache folder; where that is not to be had or not the user's, a temporary one of this process."""
    root = os.environ.get("XDG_CACHE_HOME")
    folder = (Path(root) if root else Path.home() / ".cache") / "laguna-serve" / "kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return _find_temporary()
    return folder if is_ours(folder) and os.access(folder, os.W_OK) else _find_temporary()


def is_ours(path: Path) -> bool:
    """Say whether it exists, and nobody else could have written it."""
    try:
        found = path.stat()
    except OSError:
        return False
    return found.st_uid == os.geteuid() and not found.st_mode & stat.S_IWOTH


@contextmanager
def hold_lock(path: Path) -> Iterator[None]:
    """Hold a file's lock, which the system gives up with the process."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def run_compiler(command: Sequence[str], what: str) -> None:
    """Run it to its end.

    Raises:
        BuildError: it failed, or took too long; `what` is what it was to make.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=COMPILE_LIMIT_S)
    except subprocess.TimeoutExpired:
        raise BuildError(f"{command[0]}: expected an end within {COMPILE_LIMIT_S} s, got none") from None
    if done.returncode != 0:
        first = next((line for line in done.stderr.splitlines() if "error" in line), f"status {done.returncode}")
        raise BuildError(f"{command[0]}: expected to make {what}, got {first.strip()}")
