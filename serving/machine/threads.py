"""Threads of an engine on a CPU: how many, by whose OpenMP, and how they wait for work.

vLLM for CPUs brings Intel's OpenMP along and asks for it to be preloaded; torch and what Inductor compiles otherwise
run on GNU's. On the toy teacher, two cores of a Zen 5, one thread, two starts each: plain decoding 1.15 and 1.11 times
as fast, DFlash with γ 7 1.00 and 1.04 times (bench/results/threads-cpu).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import metadata

from laguna_serve.serving.machine.cores import count_cores

THREADS, PRELOAD = "OMP_NUM_THREADS", "LD_PRELOAD"
PACKAGE, LIBRARY = "intel-openmp", "libiomp5.so"
# Any of them among what is preloaded is the caller's choice.
LIBRARIES = ("libiomp", "libomp", "libgomp")
# Either says how threads wait; Intel's OpenMP reads both.
WAITING = ("KMP_BLOCKTIME", "OMP_WAIT_POLICY")
# ms that a thread waits awake. Between two parallel regions of a step it must not fall asleep (a step of 2.5 ms takes
# 13 then), and an engine that has nothing to do should leave its cores to others sooner than after Intel's 200.
AWAKE_MS = "10"
# Weights from which on a step takes so long that the HTTP server's part of it matters less than a core of few.
LARGE_BYTES = 128 << 20
FEW_CORES = 4


def choose_threads(weight_bytes: int) -> int:
    """Choose an engine's threads: a core is left to the HTTP server, unless there are few and the model is large.

    weight_bytes: of the target; 0 where it is not known, which counts as large.
    """
    cores = count_cores()
    large = weight_bytes == 0 or weight_bytes >= LARGE_BYTES
    return cores if large and cores <= FEW_CORES else max(1, cores - 1)


def plan_threads(base: Mapping[str, str], weight_bytes: int) -> dict[str, str]:
    """Plan the variables of an engine's threads, beside those of `base`, whose choices stand."""
    planned = {THREADS: str(choose_threads(weight_bytes))} if THREADS not in base else {}
    preloaded = base.get(PRELOAD, "")
    library = None if any(name in preloaded for name in LIBRARIES) else find_openmp()
    if library is not None:
        planned[PRELOAD] = f"{preloaded}:{library}" if preloaded else library
    if LIBRARY in planned.get(PRELOAD, preloaded) and not any(name in base for name in WAITING):
        planned[WAITING[0]] = AWAKE_MS
    return planned


def find_openmp() -> str | None:
    """Find Intel's OpenMP library among this environment's packages; there is none for other processors than x86's."""
    try:
        files = metadata.files(PACKAGE) or []
    except metadata.PackageNotFoundError:
        return None
    paths = (str(os.path.realpath(file.locate())) for file in files if file.name == LIBRARY)
    # The loader takes neither of these two in a path.
    return next((path for path in paths if os.path.isfile(path) and not {" ", ":"} & set(path)), None)


def name_openmp(environment: Mapping[str, str]) -> str:
    """Name the OpenMP that an engine of this environment runs on, for records."""
    preloaded = environment.get(PRELOAD, "")
    if LIBRARY not in preloaded:
        return "LLVM's" if "libomp" in preloaded else "GNU's, or what torch brings"
    try:
        return f"Intel's {metadata.version(PACKAGE)}"
    except metadata.PackageNotFoundError:
        return "Intel's"
