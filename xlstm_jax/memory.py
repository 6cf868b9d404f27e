"""How the process keeps memory that XLA gives back, which decides a small model's speed on a CPU.

XLA for CPUs asks the C library for its working memory anew at each call, and gives it back after.
By default that memory comes as fresh pages, which the kernel must clear: a train step of a
four-block model of width 256 took 480 ms so, and 375 ms with its pages kept (two cores of an AMD
EPYC, jaxlib 0.10.2, 2026-11-22).

No flag of XLA is set: of those tried, `--xla_cpu_experimental_xnn_fusion_type` changed nothing in
jaxlib 0.10.2, and `--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_DOT` was an eighth
faster and wrong (the loss of a small mLSTM and sLSTM model by 0.2 %, by 20 % with reused memory).
"""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # of mallopt(3)


def keep_freed_memory() -> bool:
    """Let malloc keep what is freed, on one heap; call it before the first computation.

    Returns whether it could be done: only the GNU C library offers it.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, or none to be asked
        return False
    settings = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1, _M_ARENA_MAX: 1}
    return all(mallopt(name, value) == 1 for name, value in settings.items())
