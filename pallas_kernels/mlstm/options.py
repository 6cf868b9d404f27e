"""Static facts of a call of mLSTM kernels, and their contract with the gradient in `api`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

State = tuple[jax.Array, jax.Array, jax.Array]
"""C `B H K V`, n `B H K`, m `B H`: the memory and normalizer over e^m, and m; float32."""


class Kernels(NamedTuple):
    """The kernels of one kind of chip; those of TPUs and GPUs keep the same contract.

    Args:
        rows: `B H 8 T`, of `gates.forward_rows` and of `gates.backward_rows`.
        q, k, v: `B T HK`, `B T HK`, `B T HV`; heads side by side, widths multiples of the tile.
        C, n: `B H K V` and `B H 1 K`, float32: the state before the first step.
        save: whether `forward` also returns what `backward` needs.
        h, dh: `B T HV`, of the forward pass; without h the normalizer has no gradient.
        C_starts, n_starts: `B H N K V` and `B H N 1 K`, states at chunk starts.
        dC, dn: `B H K V` and `B H 1 K`, float32: cotangents of the state after the last step.

    `step` takes q, k, v `B 1 H K`, `B 1 H K`, `B 1 H V`, zeros where masked; gates `B 1 H`, and
    resets `B 1`; and the state C `B H K V`, n `B H K`, m `B H`, float32. It returns h `B 1 H V` in
    the dtype of v and the new state; under `jit`, a donated state is updated in place.
    """

    refusal: Callable[..., str | None]  # (K, V, dtype, chunk_size) -> why not supported, or None
    tile: Callable[..., Any]  # (K, V, dtype, T, chunk_size) -> the tile of a call; may raise
    width: Callable[[int, int], int]  # (size, lanes) -> the width that heads are padded to
    forward: Callable[..., "Forward"]  # (options, rows, q, k, v, C, n, *, save)
    backward: Callable[..., "Backward"]  # (options, rows, q, k, v, h, dh, *starts, dC, dn)
    step: Callable[..., Any]  # (options, q, k, v, gates, state) -> h, state: one position
    takes_step: Callable[[int, int], bool]  # (K, V): whether `step` supports these widths


class Options(NamedTuple):
    """Static sizes and numerics; hashable, so that it can be part of a jit cache key."""

    kernels: Kernels
    tile: Any  # what `kernels.tile` has returned
    max_state: bool  # the exponential input gate: m follows the gates; else m is 0 everywhere
    normalize: bool
    eps: float
    resets: bool
    lanes: int  # the least width of a tile
    interpret: Any  # here, as a gradient is traced after the context of `interpreted` has ended
    target: str | None = None  # the chip to compile for ahead of time

    @property
    def chunk(self) -> int:
        """L: positions between two boundaries at which the state is known."""
        return self.tile.chunk

    def strips(self, chunk: slice) -> list[slice]:
        """The strips of a chunk; on TPUs."""
        starts = range(chunk.start, chunk.stop, self.tile.strip)
        return [slice(start, start + self.tile.strip) for start in starts]

    def folded(self, x: jax.Array) -> jax.Array:
        """Sum of the tiles along the last axis: the same total later, with fewer shuffles."""
        return sum(x[:, start : start + self.lanes] for start in range(0, x.shape[1], self.lanes))

    def metadata(self) -> dict[str, str]:
        """Words that XLA repeats in its message, should VMEM overflow while compiling."""
        tile = f"chunk {self.chunk}, {self.tile.chunks_per_block} a block"
        smaller = self.chunk // 2 // self.lanes * self.lanes
        advice = f"pass chunk_size={smaller}" if smaller else "use more heads, each less wide"
        return {"tile": tile, "if_vmem_overflows": advice}


class Forward(NamedTuple):
    """Results of a forward pass; the last three are None unless asked for."""

    h: jax.Array  # B T HV
    C: jax.Array  # B H K V, after the last step
    n: jax.Array  # B H 1 K
    d: jax.Array | None  # B H 1 T, the signed normalizer
    C_starts: jax.Array | None  # B H N K V, states at chunk starts, in the dtype of q
    n_starts: jax.Array | None  # B H N 1 K


class Backward(NamedTuple):
    """Results of a backward pass; C and n are cotangents of the state before the first step."""

    q: jax.Array  # B T HK
    k: jax.Array  # B T HK
    v: jax.Array  # B T HV
    k_dk: jax.Array  # B H T, the sum of k * dk per position
    q_dq: jax.Array  # B H T
    scaling: jax.Array  # B H N, what scaling the state before each chunk costs
    C: jax.Array  # B H K V
    n: jax.Array  # B H 1 K
