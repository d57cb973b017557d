"""Memory: how much a process has held at most, and what the C library does with memory that JAX frees."""

import ctypes
import os
import sys
from pathlib import Path

from kmq_jax.core.errors import UserError

# From glibc's malloc.h.
TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8


def accelerator_at_hand() -> bool:
    """Whether this machine has a GPU or TPU, by its device files, and JAX is not told to use the CPU only."""
    if os.environ.get("JAX_PLATFORMS", "").lower() == "cpu":
        return False
    # NVIDIA's GPUs, AMD's, TPUs by their own driver and by VFIO. JAX itself is not asked: that would start it.
    return any(any(Path("/dev").glob(pattern)) for pattern in ("nvidia[0-9]*", "kfd", "accel[0-9]*", "vfio/[0-9]*"))


def keep_freed_memory() -> None:
    """Lets this process keep freed memory for its next allocation, instead of returning it to the system each time.

    On a CPU, XLA allocates the working memory of a step anew at every step, often more than a gigabyte. By default
    glibc maps so large a block afresh each time, and the system has to clear every page of it again. In a virtual
    machine that can cost as much as the step.

    The price is memory: the process stays as large as it has ever been. It first grows to a few times the working
    memory: a freed block beside a fragment that a thread still holds is just too small for the next step's.

    Where an accelerator is at hand nothing is changed: the working memory lies there, and the many threads that compile
    for it would wait for one another at the single arena.

    To be called before JAX starts its threads: a thread that already has an arena keeps it. C libraries other than
    glibc have no such settings; there nothing happens.
    """
    if os.name != "posix" or accelerator_at_hand():
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        # One arena for all threads; no block from mmap, which is unmapped when freed; the heap is never trimmed.
        for setting, value in ((ARENA_MAX, 1), (MMAP_MAX, 0), (TRIM_THRESHOLD, -1)):
            mallopt(setting, value)


def total_memory() -> int | None:
    """Bytes of this machine's memory; None where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # Windows
        return None


def require_memory(needed: int, what: str) -> None:
    """Refuses what this machine's memory cannot hold, before any of it is taken: some allocators end the process.

    Args:
        needed: bytes at the least.
        what: what takes them, for the message.

    Raises:
        UserError: the machine has less.

    >>> require_memory(1 << 60, "the network")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    kmq_jax.core.errors.UserError: the network: takes 1,152,921,505 GB or more, ...
    """
    there = total_memory()
    if there is not None and needed > there:
        raise UserError(f"{what}: takes {needed / 1e9:,.0f} GB or more, and this machine has {there / 1e9:,.0f}")


def peak_memory_mb() -> float:
    """The most memory that this process has held so far, in MB of 2^20 bytes; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    # macOS counts bytes, Linux units of 1024.
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)


def peak_device_mb() -> float | None:
    """The most memory that this process has held on its first device, in MB of 2^20 bytes; None if it does not tell."""
    import jax

    memory = jax.local_devices()[0].memory_stats() or {}
    return round(memory["peak_bytes_in_use"] / 2**20, 1) if "peak_bytes_in_use" in memory else None
