"""Environment variables for the processes that compute on a CPU."""

from __future__ import annotations

import os


def with_huge_pages() -> str:
    """GLIBC_TUNABLES with which malloc asks for huge pages (glibc 2.35), where the kernel gives them to those that ask, as most do.

    A step of a small model touches more pages than a processor keeps the addresses of. What the variable says already stays.
    """
    said = os.environ.get("GLIBC_TUNABLES", "")
    if "glibc.malloc.hugetlb=" in said:
        return said
    return ":".join(filter(None, [said, "glibc.malloc.hugetlb=1"]))


def cpu_environment(threads: int) -> dict[str, str]:
    """Thread count, and an allocator that keeps what it has got.

    glibc hands every large block back to the kernel and takes it anew, zeroed page by page, for the next tensor. In a virtual machine
    these page faults cost a quarter of a training step; kept memory costs nothing, since every step asks for the same again.
    """
    return {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
        "MALLOC_TOP_PAD_": str(1 << 26),
    }
