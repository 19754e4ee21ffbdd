"""Inductor's C++ kernels on a CPU: compiled once per machine, on all of its cores.

vLLM gives every configuration (lengths, batch sizes, drafter, dtype) a folder of its own, and Inductor compiles into it
whatever it finds missing there: most of it is what another configuration has compiled, character for character, at one
to two seconds each. Inductor names a library by a hash of its source, flags and compiler options, so one folder for
all of them, next to vLLM's, has what is wanted under the name that is wanted.

What that name leaves out is in the folder's: torch's version, the compiler's, and the processor's features, as
`-march=native` is another program on another processor and a home folder may be shared by several.

vLLM also has them compiled one after the other, as Inductor's pool of processes is not for the processes of an engine.
That pool compiles Triton; C++ is handed to a compiler by a pool of threads, which goes anywhere.

Read in torch 2.11 and 2.13 (`CppBuilder` of torch/_inductor/cpp_builder.py, `write` of codecache.py, `AsyncCompile`).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import platform
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from laguna_serve.kernels.isa import read_flags

logger = logging.getLogger(__name__)

FOLDER = "laguna_kernels"
# "c" and a SHA-256 in base 32; a kernel's is "….main.so", a test of the compiler has the bare name.
# Compilers at a time; each takes a third of a GiB.
MOST_COMPILERS = 8
NAMED_BY_CONTENT = re.compile(r"c[a-z2-7]{51}(\.main)?\.so")


def apply() -> None:
    """Make Inductor keep what it compiles, look there first, and compile beside itself; a second call does nothing."""
    try:
        from torch._inductor import async_compile, config, cpp_builder

        builder: Any = cpp_builder.CppBuilder
        compilers: Any = async_compile.AsyncCompile
        stock, _ = builder.build, compilers.pool
    except (ImportError, AttributeError) as error:
        logger.warning(
            "kernels: expected the modules of torch 2.13, got %s; each configuration compiles its own", error
        )
        return
    if hasattr(stock, "__wrapped__"):
        return
    builder.build = wrap_build(stock)
    cores = allowed_cores()
    if len(cores) > 1:
        threads = min(len(cores), MOST_COMPILERS)
        pool = ThreadPoolExecutor(threads, "compile", initializer=os.sched_setaffinity, initargs=(0, cores))
        compilers.pool = staticmethod(lambda: pool)
        config.compile_threads = threads


def allowed_cores() -> set[int]:
    """Return the cores of this process: its threads', each of which OpenMP may have bound to one."""
    cores = os.sched_getaffinity(0)
    for thread in Path("/proc/self/task").glob("*"):
        with contextlib.suppress(OSError):  # it has ended
            cores |= os.sched_getaffinity(int(thread.name))
    return cores


def wrap_build(stock: Callable[[Any], None]) -> Callable[[Any], None]:
    """`CppBuilder.build`, which takes a library that is named by its content from where it is kept."""

    @functools.wraps(stock)
    def build(self: Any) -> None:
        target = Path(self.get_target_file_path())
        if not NAMED_BY_CONTENT.fullmatch(target.name):
            return stock(self)
        kept = kernel_folder() / target.name
        if not _place(kept, target):
            stock(self)
            _place(target, kept)
        return None

    return build


def _place(source: Path, target: Path) -> bool:
    """Make `source` stand at `target` too, whole or not at all; say whether it does."""
    part = target.with_name(f"{target.name}.{os.getpid()}")
    try:
        if not source.stat().st_size:  # what a machine leaves that lost its power meanwhile
            return False
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, part)
        except OSError:  # another file system, or one without links
            shutil.copyfile(source, part)
        part.replace(target)
    except OSError:
        with contextlib.suppress(OSError):
            part.unlink()
        return False
    return True


@functools.cache
def kernel_folder() -> Path:
    """Return where this processor, torch and compiler keep their kernels."""
    import torch
    from torch._inductor.cpp_builder import get_compiler_version_info, get_cpp_compiler
    from vllm import envs

    parts = (
        torch.__version__,
        get_compiler_version_info(get_cpp_compiler()),
        platform.machine(),
        *sorted(read_flags()),
    )
    name = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
    return Path(envs.VLLM_CACHE_ROOT) / "torch_compile_cache" / FOLDER / name
