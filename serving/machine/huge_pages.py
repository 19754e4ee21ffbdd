"""Huge pages of an engine on a CPU: weights and KV cache in pages of 2 MiB instead of 4 KiB, without a privilege.

A step reads all of a model's weights once. By pages of 4 KiB that is a walk of the page table for every 4 KiB, twice
as deep in a virtual machine, and the processor's prefetching stops at each page's end. Linux has pages of 2 MiB for
memory whose program asks for them, which glibc's allocator does if a variable tells it to.

https://sourceware.org/glibc/manual/latest/html_node/Memory-Allocation-Tunables.html (glibc.malloc.hugetlb, since 2.35)
https://docs.kernel.org/admin-guide/mm/transhuge.html
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

TUNABLES, HUGETLB = "GLIBC_TUNABLES", "glibc.malloc.hugetlb"
# Asks for transparent huge pages; 2 would take those that an administrator has set apart.
TRANSPARENT = f"{HUGETLB}=1"
FIRST_GLIBC = (2, 35)
FOLDER = Path("/sys/kernel/mm/transparent_hugepage")
# glibc rounds every growth of the heap up to a huge page; on ARM with pages of 64 KiB one has 512 MiB.
SIZE_BYTES = 2 << 20
# Among what is preloaded, another allocator than glibc's.
ALLOCATORS = ("tcmalloc", "jemalloc", "mimalloc")


def plan_huge_pages(base: Mapping[str, str]) -> dict[str, str]:
    """Plan the variable that asks for huge pages, beside what `base` says of the allocator; nothing in vain."""
    tunables = base.get(TUNABLES, "")
    if HUGETLB in tunables or read_policy() in {None, "never"} or read_glibc() < FIRST_GLIBC:
        return {}
    return {TUNABLES: f"{tunables}:{TRANSPARENT}" if tunables else TRANSPARENT}


def read_policy() -> str | None:
    """Read to whom Linux gives pages of 2 MiB: `always`, `madvise` (who asks) or `never`; None without them."""
    try:
        chosen = re.search(r"\[(\w+)\]", (FOLDER / "enabled").read_text(encoding="utf-8"))
        size = int((FOLDER / "hpage_pmd_size").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return chosen[1] if chosen and size == SIZE_BYTES else None


def read_glibc() -> tuple[int, ...]:
    """Read the version of glibc that this program runs on; empty on another C library."""
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    except (OSError, ValueError):
        return ()
    return tuple(int(part) for part in re.findall(r"\d+", version)) if name == "glibc" else ()


def describe_huge_pages(environment: Mapping[str, str]) -> str:
    """Describe the pages that an engine of this environment gets, and what to do where it gets small ones."""
    policy, small = read_policy(), f"{os.sysconf('SC_PAGE_SIZE') >> 10} KiB"
    tunables = environment.get(TUNABLES, "")
    if policy == "always":
        return "2 MiB where they fit"
    if policy == "never":
        return (
            f"{small}: {FOLDER / 'enabled'} says never; with madvise there, large models decode a few per cent faster"
        )
    if policy is None:
        return small
    if any(name in environment.get("LD_PRELOAD", "") for name in ALLOCATORS):
        return "as the allocator in LD_PRELOAD asks for them"
    if TRANSPARENT in tunables:
        return "2 MiB where they fit"
    return f"as {TUNABLES} says" if HUGETLB in tunables else f"{small}: glibc 2.35 or later would ask for huge ones"
