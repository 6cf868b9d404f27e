"""Process settings for training on a CPU: glibc's allocator and JAX's dispatch.

Each call of a compiled program allocates its temporary buffers with malloc and frees them at the
end: hundreds of megabytes for a small model. By default glibc gets such blocks from the kernel and
returns them, so every call pays for page faults and for zeroing 4 KiB pages. `prepare` makes the
process keep freed memory, on huge pages.

glibc keeps memory only in the heap of the main thread; other threads have small arenas and still
get large blocks from the kernel. `prepare` therefore disables asynchronous dispatch, and programs
run in the thread that calls them.

Time of a train step in `experiments/benchmarks/train_step.py`, fastest of 20 (two cores of an AMD
EPYC, jaxlib 0.10.2, 2026-11-22):

    architecture        default   memory reused  all settings
    first generation     348 ms        286 ms         246 ms
    large                407 ms        336 ms         305 ms

No XLA flag is set. `--xla_cpu_experimental_xnn_fusion_type`, wider vectors and another scheduler
made no difference. `--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_DOT` was 12 %
faster, but the loss of a small model with mLSTM and sLSTM blocks was wrong by 0.2 %, and by 20 %
together with these settings.
"""

import ctypes
import os
from typing import Any

import jax

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # parameters of mallopt(3)
_MADV_HUGEPAGE = 14
_HUGE_PAGE = 2**21  # bytes
_INT_MAX = 2**31 - 1
RESERVED_BYTES = _INT_MAX - 2**24
"""Heap range that is marked for huge pages; it uses memory only where the process writes to it."""

_ASYNC_DISPATCH = "JAX_CPU_ENABLE_ASYNC_DISPATCH"


def prepare() -> bool:
    """Configures the process for training on a CPU; call it before the first computation.

    Results do not change, nor does the speed of other devices. If the environment variable
    `JAX_CPU_ENABLE_ASYNC_DISPATCH` is set, it decides about asynchronous dispatch.

    Returns:
        Whether freed memory stays in the process, which only glibc supports.
    """
    if _ASYNC_DISPATCH not in os.environ:
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        libc = ctypes.CDLL(None)
        mallopt = libc.mallopt
    except (AttributeError, OSError, TypeError):  # another C library, or none to load
        return False
    # No mmap for large blocks, and no trimming of the heap: freed memory stays in the process.
    if mallopt(_M_MMAP_MAX, 0) != 1 or mallopt(_M_TRIM_THRESHOLD, _INT_MAX) != 1:
        return False
    _advise_huge_pages(libc)
    return True


def _advise_huge_pages(libc: Any) -> None:
    """Grows the heap by a block, marks it for huge pages and frees it; errors are ignored."""
    # Without these types ctypes would truncate pointers to 32 bits.
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    start = libc.malloc(RESERVED_BYTES)
    if start is None:
        return
    # madvise takes full huge pages: round the start up and the end down.
    first = -(-start // _HUGE_PAGE) * _HUGE_PAGE
    end = (start + RESERVED_BYTES) // _HUGE_PAGE * _HUGE_PAGE
    libc.madvise(first, end - first, _MADV_HUGEPAGE)
    libc.free(start)
