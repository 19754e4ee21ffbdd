"""Builds native/ into one library for all processors of an architecture, once, in the user's cache.

Every instruction set has a file of its own, compiled with its own flags; which one runs is decided when the library is
loaded (cpu.py).  A set that the compiler does not know is left out.  g++ from 11 and clang++ from 14 will do.  The
library uses torch's stable interface, so that a newer torch does not need another.
"""

from __future__ import annotations

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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

SOURCES = Path(__file__).with_name("native")
COMPILERS = ("g++", "clang++", "c++")
# Strict floating point: a row's bits may not depend on how the compiler regroups or contracts a sum.
STRICT = ("-O3", "-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
FLAGS = (*STRICT, "-fPIC", "-fvisibility=hidden", "-w", "-DTORCH_TARGET_VERSION=0x020a000000000000")
# Files that any processor runs, and by architecture those that it must have the instructions for.
COMMON = ("driver", "op", "pairs", "paths", "path_portable")
PATHS = {
    "x86_64": {
        "path_avx2": ("-mavx2", "-mfma", "-mf16c"),
        "path_avx512": ("-mavx512f", "-mavx512bw", "-mfma", "-mf16c"),
        "path_avx512bf16": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512bf16", "-mfma", "-mf16c"),
    },
    "aarch64": {"path_neon": (), "path_neonbf16": ("-march=armv8.2-a+bf16",)},
}
COMPILE_LIMIT_S = 300


class BuildError(RuntimeError):
    """The library could not be built or loaded, as one line."""


@dataclass(frozen=True, slots=True)
class Compiler:
    """`command`: what is in CXX, a compiler cache perhaps before the compiler."""

    command: tuple[str, ...]
    version: str


def build() -> Path:
    """The library, compiled unless the cache has it; processes that want it at once wait for the first.

    Raises:
        BuildError: no compiler, or it failed.
        OSError: neither the cache nor a temporary folder can be written.
    """
    compiler = find_compiler()
    library = find_cache() / f"sentinel_moe-{make_key(compiler)}.so"
    if is_ours(library):
        return library
    with hold_lock(library.with_suffix(".lock")):
        if not is_ours(library):
            with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
                compile_library(compiler, Path(scratch) / library.name).replace(library)
    return library


def find_compiler() -> Compiler:
    """What CXX names, or else the first of the usual compilers.

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


def make_key(compiler: Compiler) -> str:
    """A name that changes with all that the library is made of."""
    parts = [path.read_text(encoding="utf-8") for path in sorted(SOURCES.iterdir()) if path.suffix in (".cpp", ".hpp")]
    parts += [*compiler.command, compiler.version, *FLAGS, repr(PATHS), platform.machine(), torch.__version__]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


@functools.cache
def _find_temporary() -> Path:
    return Path(tempfile.mkdtemp(prefix="laguna-kernels-"))


def find_cache() -> Path:
    """The user's cache folder, or a temporary one, of this process, where that is not to be had or not the user's."""
    root = os.environ.get("XDG_CACHE_HOME")
    folder = (Path(root) if root else Path.home() / ".cache") / "laguna-serve" / "kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return _find_temporary()
    return folder if is_ours(folder) and os.access(folder, os.W_OK) else _find_temporary()


def is_ours(path: Path) -> bool:
    """It exists, and nobody else could have written it."""
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


def compile_library(compiler: Compiler, library: Path) -> Path:
    """Compile every file, as many at once as there are processors, and link them.

    Raises:
        BuildError: a file that any processor needs does not compile, or they do not link.
    """
    own = PATHS.get(platform.machine(), {})
    units: dict[str, tuple[str, ...]] = {**own, **dict.fromkeys(COMMON, ())}  # the longest first
    torch_folder = Path(torch.__file__).parent

    def compile_unit(name: str) -> Path | None:
        unit = library.with_name(f"{name}.o")
        include = ("-isystem", str(torch_folder / "include"))
        command = [*compiler.command, *FLAGS, *units[name], *include, "-c", str(SOURCES / f"{name}.cpp")]
        try:
            _run([*command, "-o", str(unit)], f"{name}.cpp")
        except BuildError:
            if name in own:
                return None
            raise
        return unit

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        made = [str(unit) for unit in pool.map(compile_unit, units) if unit is not None]
    link = ("-L", str(torch_folder / "lib"), "-ltorch_cpu")
    _run([*compiler.command, "-shared", "-o", str(library), *made, *link], "the library")
    return library


def _run(command: list[str], what: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=COMPILE_LIMIT_S)
    except subprocess.TimeoutExpired:
        raise BuildError(f"{command[0]}: expected an end within {COMPILE_LIMIT_S} s, got none") from None
    if done.returncode != 0:
        first = next((line for line in done.stderr.splitlines() if "error" in line), f"status {done.returncode}")
        raise BuildError(f"{command[0]}: expected to make {what}, got {first.strip()}")
