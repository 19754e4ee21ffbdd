"""Which instructions kernels may use on a CPU: all that it has, unless a variable holds them or torch's to fewer.

Without an import of torch: the launcher asks here, too (serving/machine).
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import re
from collections.abc import Collection, Mapping
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
# Holds this project's own kernels to a path; anything but these also says that bf16 arithmetic is not to be used.
VARIABLE = "LAGUNA_CPU_ISA"
TILES = "amx"
BF16 = ("avx512bf16", TILES, "neonbf16")
# `vllm`: linear layers and whole experts are multiplied by what vLLM has for them.
KERNELS_VARIABLE = "LAGUNA_CPU_KERNELS"
VLLM = "vllm"
AVX512 = frozenset(("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx2", "fma"))
# Of kernels/linear, best first, with the instructions (as /proc/cpuinfo calls them) that each needs.
PATHS: dict[str, frozenset[str]] = {
    TILES: AVX512 | {"avx512_bf16", "amx_bf16", "amx_tile"},
    BF16[0]: AVX512 | {"avx512_bf16"},
    "avx512": AVX512,
    "avx2": frozenset(("avx2", "fma")),
    "neon": frozenset(("asimd",)),
    "portable": frozenset(),
}
X86 = (TILES, BF16[0], "avx512", "avx2")
AMX = frozenset(("amx_bf16", "amx_tile", "amx_int8", "amx_fp16", "amx_fp8", "amx_complex"))
# Instructions that multiply in bfloat16; `bf16` is ARM's.
BF16_ARITHMETIC = frozenset(("avx512_bf16", "amx_bf16", "bf16"))
INTEL = "GenuineIntel"
# oneDNN's and ATen's own limits, for which a processor may be better than it is used.
LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
WITHOUT_AVX512 = frozenset(("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "DEFAULT"))
WITHOUT_BF16 = WITHOUT_AVX512 | {"AVX512_CORE", "AVX512_CORE_VNNI"}
WITHOUT_AMX = WITHOUT_BF16 | {"AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX10_1_512"}
# Of Linux: a process asks for the registers of tiles before it, or a thread of it, uses one.
ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XTILEDATA = 158, 0x1023, 18


class IsaError(ValueError):
    """A path that there is not, or that the processor does not run, or a variable's wrong value; one line."""


@functools.cache
def ask_for_tiles() -> bool:
    """Ask Linux for AMX's registers, for all of this process; whether it may use them.

    A process that was not given them dies of an illegal instruction at its first tile. oneDNN asks for itself, so do
    ours; vLLM's own kernels (attention, small matrices, experts) have them only where somebody asked before.
    """
    if platform.machine() != "x86_64" or "amx_tile" not in read_flags():
        return False
    refused: int = ctypes.CDLL(None).syscall(ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XTILEDATA)
    return not refused


def read_flags(cpuinfo: Path = CPUINFO) -> frozenset[str]:
    """Read the processor's instructions and, on x86, its vendor (INTEL); none where the kernel does not tell."""
    try:
        text = cpuinfo.read_text(encoding="utf-8")
    except OSError:
        return frozenset()
    first = text.partition("\n\n")[0]
    return frozenset(
        word
        for line in re.findall(r"^(?:flags|Features|vendor_id)\s*: (.*)$", first, re.MULTILINE)
        for word in line.split()
    )


def find_usable(flags: Collection[str] | None = None, environ: Mapping[str, str] = os.environ) -> frozenset[str]:
    """Find what may be used of the processor's instructions: AMX, if it is given to this process, and not limited."""
    if flags is None:
        flags = read_flags()
        if not ask_for_tiles():
            flags -= AMX
    return frozenset(flags) - (AMX if _limits(environ) & WITHOUT_AMX else frozenset())


def has_slow_bf16(flags: Collection[str]) -> bool:
    """Whether bf16 is multiplied in less time by widening it: Intel's cores where AMX is missing, or hidden from a VM.

    Their AVX512-BF16 starts an instruction in every second cycle (family 6, model 207: 0.74 ns each, and 0.18 a
    multiplication in float32, of which two start in a cycle): 16 products a cycle where float32 has 32.
    """
    return INTEL in flags and BF16_ARITHMETIC & set(flags) == {"avx512_bf16"}


def multiplies_bf16(flags: Collection[str] | None = None, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the processor has bf16 arithmetic that may be used, and is worth it or asked for by LAGUNA_CPU_ISA."""
    asked = environ.get(VARIABLE)
    if (asked or BF16[0]) not in BF16 or _limits(environ) & WITHOUT_BF16:
        return False
    present = find_usable(flags, environ)
    return bool(BF16_ARITHMETIC & present) and (bool(asked) or not has_slow_bf16(present))


def choose_path(flags: Collection[str] | None = None, environ: Mapping[str, str] = os.environ) -> str:
    """Choose the best path of kernels/linear for the processor, or the one that LAGUNA_CPU_ISA names.

    Raises:
        IsaError: it names none, or one whose instructions the processor lacks.
    """
    present = find_usable(flags, environ)
    wanted, known = environ.get(VARIABLE), dict.fromkeys((*BF16, *PATHS))
    if wanted and wanted not in known:
        raise IsaError(f"{VARIABLE}: expected {', '.join(known)}, got {wanted!r}; correct or unset it")
    if wanted in PATHS:
        if missing := sorted(PATHS[wanted] - set(read_flags() if flags is None else flags)):
            raise IsaError(f"{VARIABLE}={wanted}: expected a processor with {', '.join(missing)}; unset it")
        if wanted == TILES and flags is None and not ask_for_tiles():
            raise IsaError(f"{VARIABLE}={wanted}: expected Linux to give this process AMX's tiles, got none; unset it")
        return wanted
    limits = _limits(environ)
    barred = set(BF16) if limits & WITHOUT_BF16 or has_slow_bf16(present) else set()
    barred |= {"avx512"} if limits & WITHOUT_AVX512 else set()
    return next(path for path, needed in PATHS.items() if needed <= present and path not in barred)


def uses_linear_op(flags: Collection[str] | None = None, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether linear layers in bfloat16 run in kernels/linear, and not in what vLLM has for them.

    That is the better one with ARM's bf16, or LAGUNA_CPU_KERNELS=vllm.

    Raises:
        IsaError: a variable has a value that it cannot have.
    """
    if (wanted := environ.get(KERNELS_VARIABLE, "")).lower() not in ("", VLLM):
        raise IsaError(f"{KERNELS_VARIABLE}: expected {VLLM} or nothing, got {wanted!r}; correct or unset it")
    own = not multiplies_bf16(flags, environ) or choose_path(flags, environ) in (TILES, BF16[0])
    return own and not wanted


def uses_own_experts(flags: Collection[str] | None = None, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether experts in bfloat16 of which nothing is pruned run in kernels/sentinel_moe, too, not in vLLM's kernel.

    Where linear layers do, on x86: ARM's paths have not been timed.

    Raises:
        IsaError: a variable has a value that it cannot have.
    """
    return uses_linear_op(flags, environ) and choose_path(flags, environ) in X86


def _limits(environ: Mapping[str, str]) -> set[str]:
    return {environ.get(name, "").upper() for name in LIMITS}
