"""Static options of a kernel call, and the contract between the kernels and `api`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

State = tuple[jax.Array, jax.Array, jax.Array]
"""C `B H K V`, n `B H K`, m `B H`, float32: C and n are scaled by exp(-m)."""


class Kernels(NamedTuple):
    """The kernels of one backend; TPU and GPU kernels have the same contract.

    Args:
        gates: log gates `B T H`, in float32, padded to full chunks.
        m_first: `B H`, stabilizer before the first step.
        K: width of a head before padding.
        m_starts: `B H N`, stabilizers before the chunks, from `pack_forward`.
        d: `B H 1 T`, q n of the forward pass; None without normalizer.
        packed: `B H 8 T`, from `pack_forward` or `pack_backward`; see `packing.PackedGates`.
        q, k, v: `B T HK`, `B T HK`, `B T HV`; adjacent heads, padded to `widths`.
        C, n: `B H K V` and `B H 1 K`, float32: the state before the first step; None for zeros.
        save: whether `forward` also returns the residuals of `backward`.
        h, dh: `B T HV`, output of the forward pass and its cotangent; h is None without normalizer.
        C_starts, n_starts: states at chunk starts, as `forward` returned them.
        dC, dn: `B H K V` and `B H 1 K`, float32: cotangents of the state after the last step; None
            for zeros.
        end: `B H`, cotangent of the log scale of that state.

    `step` takes q, k, v `B 1 H K`, `B 1 H K`, `B 1 H V`, zeros where masked; gates `B 1 H` and
    resets `B 1`; and the state C `B H K V`, n `B H K`, m `B H` in float32. It returns h `B 1 H V`
    in the dtype of v and the new state; on a TPU, a donated state is updated in place.
    """

    refusal: Callable[..., str | None]  # (K, V, dtype, chunk_size) -> why not supported, or None
    tile: Callable[..., Any]  # (K, V, dtype, T, chunk_size) -> tile; may raise ValueError
    widths: Callable[..., tuple[int, int]]  # (H, K, V, lanes) -> widths that heads are padded to
    pack_forward: Callable[..., "Packed"]  # (options, K, gates, m_first)
    pack_backward: Callable[..., jax.Array]  # (options, K, gates, m_starts, d, h, dh) -> packed
    gate_grads: Callable[..., Any]  # (options, gates, grads, end) -> dlog_i, dlog_f, `B T H`
    forward: Callable[..., "Forward"]  # (options, packed, q, k, v, C, n, *, save)
    backward: Callable[..., "Backward"]  # (options, packed, q, k, v, h, dh, *starts, dC, dn)
    step: Callable[..., Any]  # (options, q, k, v, gates, state) -> h, state; T = 1
    supports_step: Callable[[int, int], bool]  # (K, V): whether `step` supports these widths


class Options(NamedTuple):
    """Static sizes and numerics; hashable, so that it can be a part of a jit cache key."""

    kernels: Kernels
    tile: Any  # result of `kernels.tile`
    forget_gate: str
    max_state: bool  # m is a running maximum (an exponential gate); else m is 0 everywhere
    normalize: bool
    eps: float
    resets: bool
    lanes: int  # smallest width of a tile
    # Stored, because a gradient may be traced after the contexts of `common` have exited.
    interpret: Any
    target: str | None = None  # chip to compile for ahead of time
    zero_state: bool = False  # the state before the first step is zeros: C and n are None

    @property
    def chunk(self) -> int:
        """L, positions in a chunk."""
        return self.tile.chunk

    def strips(self, chunk: slice) -> list[slice]:
        """Slices of `tile.strip` positions of a chunk; TPU tiles only."""
        starts = range(chunk.start, chunk.stop, self.tile.strip)
        return [slice(start, start + self.tile.strip) for start in starts]

    def fold_lanes(self, x: jax.Array) -> jax.Array:
        """Adds the tiles along the last axis, so that a later sum needs fewer lane shuffles."""
        return sum(x[:, start : start + self.lanes] for start in range(0, x.shape[1], self.lanes))

    def metadata(self) -> dict[str, str]:
        """Metadata that XLA quotes in its error message if VMEM overflows during compilation."""
        tile = f"chunk {self.chunk}, {self.tile.chunks_per_block} per block"
        smaller = self.chunk // 2 // self.lanes * self.lanes
        advice = f"pass chunk_size={smaller}" if smaller else "use more heads of a smaller width"
        return {"tile": tile, "if_vmem_overflows": advice}


class Packed(NamedTuple):
    """Gates of a forward pass, and stabilizers."""

    packed: jax.Array  # B H 8 T
    m_starts: jax.Array  # B H N, before each chunk
    m_last: jax.Array  # B H, after the last step


class Forward(NamedTuple):
    """Results of a forward pass; the last three are None without `save`."""

    h: jax.Array  # B T HV
    C: jax.Array  # B H K V, after the last step
    n: jax.Array  # B H 1 K
    d: jax.Array | None  # B H 1 T, q n, from which the normalizer is computed
    C_starts: jax.Array | None  # B H N K V, states at chunk starts, in the dtype of q
    n_starts: jax.Array | None  # B H N 1 K


class Backward(NamedTuple):
    """Cotangents of q, k, v and of the state before the first step, and sums for the gates."""

    q: jax.Array  # B T HK
    k: jax.Array  # B T HK
    v: jax.Array  # B T HV
    k_dk: jax.Array  # B H parts T, sums of k * dk over parts of K
    q_dq: jax.Array  # B H parts T, sums of q * dq over parts of K
    scaling: jax.Array  # B H N parts, cotangent of the log scale of the state before each chunk
    C: jax.Array | None  # B H K V; C and n may be None with `Options.zero_state`
    n: jax.Array | None  # B H 1 K
