"""Shared by the Triton kernels; importing it requires Triton.

Every kernel is decorated with `no_type_check`: Triton parses a kernel's source, which the run-time
type checker of the tests would hide behind a wrapper.
"""

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def product(a, b, UPCAST: tl.constexpr):
    """`a @ b`, accumulated in float32. float32 operands are split into three tf32 parts, which
    loses their last two bits. UPCAST is for the interpreter, which cannot multiply bfloat16."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
@no_type_check
def probe(x, out):
    """Copies one number; `gpu` compiles it to check that the installed versions work together."""
    tl.store(out, tl.load(x))
