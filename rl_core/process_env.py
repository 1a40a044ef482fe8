"""Environment variables for the processes that compute on a CPU."""

from __future__ import annotations


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
