"""What a process that trains on a CPU asks of the C library and of JAX before it computes.

XLA for CPUs asks malloc for its working memory anew at each call, hundreds of megabytes for a small
model, and gives it back after. By default that memory comes as fresh pages of 4 KiB, which the
kernel clears and the processor looks up one by one. Here it stays in the process, on huge pages.

That holds for the heap of the main thread alone: other threads have small heaps of their own and
take what is large from the kernel. So programs run in the thread that calls them. (One heap for all
threads keeps the memory as well, but they then wait for each other at every small allocation.)

Train steps of the benchmark's two models, two cores of an AMD EPYC, jaxlib 0.10.2, fastest of 20,
2026-11-22: first generation 348 ms untouched, 286 ms with memory kept, 246 ms with all of this;
large 407, 336 and 305 ms.

No flag of XLA is set: of those tried, `--xla_cpu_experimental_xnn_fusion_type` changed nothing in
jaxlib 0.10.2, and `--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_DOT` was an eighth
faster and wrong (the loss of a small mLSTM and sLSTM model by 0.2 %, by 20 % with reused memory).
Neither wider vectors nor another scheduler made a difference.
"""

import ctypes
import os
from typing import Any

import jax

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of mallopt(3)
_MADV_HUGEPAGE = 14
_HUGE_PAGE = 2**21
_LARGEST_INT = 2**31 - 1
RESERVED_BYTES = _LARGEST_INT - 2**24
"""Address space set aside for huge pages; it becomes memory where it is touched."""

_ASYNC_DISPATCH = "JAX_CPU_ENABLE_ASYNC_DISPATCH"


def prepare() -> bool:
    """Makes a process ready to train on a CPU; call it before the first computation.

    It changes speed only, and nothing for other devices. What the environment says about JAX's
    dispatch is left alone.

    Returns whether memory is kept: only the GNU C library offers it.
    """
    if _ASYNC_DISPATCH not in os.environ:
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    try:
        libc = ctypes.CDLL(None)
        mallopt = libc.mallopt
    except (AttributeError, OSError, TypeError):  # another C library, or none to be asked
        return False
    if mallopt(_M_MMAP_MAX, 0) != 1 or mallopt(_M_TRIM_THRESHOLD, _LARGEST_INT) != 1:
        return False
    _ask_for_huge_pages(libc)
    return True


def _ask_for_huge_pages(libc: Any) -> None:
    """Grows the heap once, marks what was gained, and frees it; a refusal changes nothing."""
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    start = libc.malloc(RESERVED_BYTES)
    if start is None:
        return
    first = -(-start // _HUGE_PAGE) * _HUGE_PAGE
    last = (start + RESERVED_BYTES) // _HUGE_PAGE * _HUGE_PAGE
    libc.madvise(first, last - first, _MADV_HUGEPAGE)
    libc.free(start)
