"""Process settings for training on a CPU: glibc's allocator and JAX's dispatch.

XLA's CPU backend allocates its temporary buffers with malloc in every call, hundreds of megabytes
for a small model, and frees them afterwards. By default each allocation consists of fresh 4 KiB
pages, which the kernel zeroes and which need a page-table lookup each. With these settings the
process retains the memory, on huge pages.

This applies to the heap of the main thread only: other threads have small arenas and get large
blocks from the kernel. So programs run in the calling thread, without asynchronous dispatch.

Train steps of the benchmark's two models, two cores of an AMD EPYC, jaxlib 0.10.2, fastest of 20,
2026-11-22: first generation 348 ms by default, 286 ms with retained memory, 246 ms with all
settings; large 407, 336 and 305 ms.

No XLA flag is set: of those tried, `--xla_cpu_experimental_xnn_fusion_type` changed nothing in
jaxlib 0.10.2, and `--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_DOT` was an eighth
faster and wrong (the loss of a small mLSTM and sLSTM model by 0.2 %, by 20 % with retained memory).
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
"""Address space reserved for huge pages; the kernel backs it with memory when it is touched."""

_ASYNC_DISPATCH = "JAX_CPU_ENABLE_ASYNC_DISPATCH"


def prepare() -> bool:
    """Configure the process for training on a CPU; call it before the first computation.

    Changes speed only, and nothing on other devices. The environment variable
    `JAX_CPU_ENABLE_ASYNC_DISPATCH` takes precedence.

    Returns whether freed memory is retained; only glibc supports that.
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
    """Grow the heap once, advise huge pages for it, and free it; failures have no effect."""
    # Without these types ctypes would truncate pointers to 32 bits.
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    start = libc.malloc(RESERVED_BYTES)
    if start is None:
        return
    # Only complete huge pages: round the start up and the end down.
    first = -(-start // _HUGE_PAGE) * _HUGE_PAGE
    last = (start + RESERVED_BYTES) // _HUGE_PAGE * _HUGE_PAGE
    libc.madvise(first, last - first, _MADV_HUGEPAGE)
    libc.free(start)
