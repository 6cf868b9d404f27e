"""What does not change while an mLSTM kernel runs."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Options(NamedTuple):
    """Static sizes and numerics; hashable, so that it can be part of a jit cache key."""

    chunk: int  # L: positions between two borders at which the state is known
    strip: int  # rows of a chunk worked on at once
    chunks_per_block: int  # chunks per step of the grid
    max_state: bool  # the exponential input gate: m follows the gates; else m is 0 everywhere
    normalize: bool
    eps: float
    normalizer_grad: bool  # False: the normaliser is taken for a constant, as in reference training
    resets: bool
    saved_dtype: jnp.dtype  # of the states kept at chunk starts
    vmem_bytes: int | None  # what a kernel may take of VMEM; None: the compiler's default
    lanes: int  # widths are multiples of it
    interpret: Any  # of `pallas_call`; here, as a gradient is traced when its context has gone

    def strips(self, chunk: slice) -> list[slice]:
        """The positions of a chunk in pieces of `strip`."""
        starts = range(chunk.start, chunk.stop, self.strip)
        return [slice(start, start + self.strip) for start in starts]

    def folded(self, x: jax.Array) -> jax.Array:
        """Sum of the tiles along the last axis: the same total later, with fewer shuffles."""
        return sum(x[:, start : start + self.lanes] for start in range(0, x.shape[1], self.lanes))

    def metadata(self) -> dict[str, str]:
        """Words that XLA repeats in its message, should VMEM overflow while compiling."""
        tile = f"chunk {self.chunk}, {self.chunks_per_block} a block"
        smaller = self.chunk // 2 // self.lanes * self.lanes
        advice = f"pass chunk_size={smaller}" if smaller else "use more heads, each less wide"
        return {"tile": tile, "if_vmem_overflows": advice}
