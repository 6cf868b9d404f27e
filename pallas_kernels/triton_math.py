"""What the Triton kernels share; needs Triton to import.

Every kernel is marked `no_type_check`: Triton reads its source, and a checker of annotations at run
time, as the tests have one, would hide that behind a wrapper of its own.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def product(a, b, UPCAST: tl.constexpr):
    """`a @ b` in float32. float32 operands are taken as three parts of tf32 each: all but the last
    two bits. UPCAST is for the interpreter, which cannot multiply bfloat16."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="tf32x3")
