"""What the Triton kernels share; needs Triton to import."""

import triton
import triton.language as tl


@triton.jit
def product(a, b, UPCAST: tl.constexpr):
    """`a @ b` in float32. float32 operands are taken as three parts of tf32 each: all but the last
    two bits. UPCAST is for the interpreter, which cannot multiply bfloat16."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="tf32x3")
