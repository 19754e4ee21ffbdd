"""What of the file system a program may read: Python's library and the system's shared ones, and packages by name."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from pathlib import Path

from laguna_serve.evals.sandbox.trial import JailError

# Where the packages that a program may import are mounted.
PACKAGES_FOLDER = "/packages"
LIBRARIES = (
    "/lib",
    "/lib32",
    "/lib64",
    "/usr/lib",
    "/usr/lib32",
    "/usr/lib64",
    "/etc/ld.so.cache",
    "/usr/share/zoneinfo",
)
PACKAGES = ("site-packages", "dist-packages", "python3*/site-packages", "python3*/dist-packages")


@functools.cache
def find_packages(names: tuple[str, ...]) -> list[tuple[str, str]]:
    """Where packages are to be mounted, and where they are.

    Raises:
        JailError: one of them is not installed.
    """
    found: list[tuple[str, str]] = []
    for name in names:
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
        if spec is None or spec.origin is None:
            raise JailError(f"packages: expected installed ones, got {name!r}; install it, or leave it out")
        origin = Path(spec.origin)
        path = origin.parent if spec.submodule_search_locations else origin
        beside = path.parent / f"{name}.libs"  # shared libraries of a wheel
        found += [(f"{PACKAGES_FOLDER}/{each.name}", str(each)) for each in (path, beside) if each.exists()]
    return found


@functools.cache
def list_paths() -> tuple[list[tuple[str, str]], list[str]]:
    """List what of the file system a program may read, and folders within it that are to be empty.

    The first, (path, real path), are the standard library and the libraries under it; the second, packages.
    """
    roots = [os.path.dirname(os.__file__), *(prefix + "/lib" for prefix in (sys.base_prefix, sys.base_exec_prefix))]
    readable: list[tuple[str, str]] = []
    for path in sorted({*LIBRARIES, *roots}):
        inside = any(path.startswith(known + "/") for known, _ in readable)
        if os.path.exists(path) and not inside:
            readable.append((path, os.path.realpath(path)))
    hidden = {str(path) for root, _ in readable for pattern in PACKAGES for path in Path(root).glob(pattern)}
    return readable, sorted(hidden)
