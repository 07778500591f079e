"""Freed memory stays with the process, so that the next array does not have to ask the system for it again; or not.

glibc returns large freed blocks at once and takes new ones page by page, each page cleared by the kernel. A training
step and a phantom free and take the same blocks over and over; on virtual machines those page faults can cost as much
as the arithmetic. Only the command line and the benchmarks do this: a library leaves the allocator of its host alone.
"""

from __future__ import annotations

import ctypes
import os

__all__ = ["keep_memory", "release_memory"]

# mallopt's number and the variable that new processes read, from glibc's malloc.h; bytes
_LIMITS = {
    "MALLOC_MMAP_THRESHOLD_": (-3, 256 << 20),  # larger blocks go back to the system as before
    "MALLOC_TRIM_THRESHOLD_": (-1, 512 << 20),  # more than that is not kept
    "MALLOC_TOP_PAD_": (-2, 64 << 20),  # asked for at once
}


def keep_memory() -> bool:
    """Let this process, and those it starts, keep up to 512 MiB of freed memory each.

    No number changes by it. What the environment says already (``MALLOC_*``, or ``GLIBC_TUNABLES`` of malloc) stands.

    Returns: Whether it was done; not where the C library is not glibc, nor against the environment.
    """
    if any(name in os.environ for name in _LIMITS) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS, musl, Windows
        return False
    for name, (number, size) in _LIMITS.items():
        mallopt(number, size)
        os.environ[name] = str(size)  # read by the C library of loader workers and of a study's processes
    return True


def release_memory() -> bool:
    """Let this process give freed blocks of more than 1 MiB back at once: what a loader worker does.

    A worker makes batches that another process takes over: kept by threads in turn, the blocks of their parts leave
    holes, and a worker was seen to hold half a gigabyte for arrays of 50 MB. No number changes by it.

    Returns: Whether it was done; not where the C library is not glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    for number, size in ((-3, 1 << 20), (-1, 1 << 20), (-2, 0)):
        mallopt(number, size)
    return True
