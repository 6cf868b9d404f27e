"""What the benchmark of kernels computes, at which sizes, and the least that it could take."""

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from pallas_kernels.hardware import gpu_by_device_kind
from tests import workloads

PARTS = ("forward", "gradient", "decode")
ITEM_BYTES = {"bfloat16": 2, "float32": 4}
ATTENTION_WIDTH = 128
"""Of attention's heads, which take as many columns together as the mLSTM's values."""

CHUNK, SQUARE = 256, 64
"""Of the mLSTM whose work is the bound: chunks, and the squares left out above a diagonal."""

CACHED_BYTES = 256 << 20
"""More than any cache of the last level: states of a decode step are as many as fill this."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One call: sizes of arrays, and which part of the computation is timed."""

    op: str  # "mlstm" or "slstm"
    part: str  # of `PARTS`; "gradient" is forward and backward
    B: int
    T: int
    H: int
    K: int
    V: int
    dtype: str = "bfloat16"
    most_states: int = 32  # of a decode step

    @property
    def tokens(self) -> int:
        """Positions of all sequences."""
        return self.B * self.T

    @property
    def section(self) -> str:
        """Of the benchmark: "mlstm", "slstm" or "decode"."""
        return "decode" if self.part == "decode" else self.op

    @property
    def attention_heads(self) -> int:
        """Of attention in its place."""
        return max(1, self.H * self.V // ATTENTION_WIDTH)

    @property
    def num_states(self) -> int:
        """States that a decode step is timed on, one after the other, as of layers."""
        if self.part != "decode":
            return 1
        elements = 4 * self.K if self.op == "slstm" else self.K * self.V
        return max(1, min(self.most_states, CACHED_BYTES // (4 * self.B * self.H * elements)))


class Work(NamedTuple):
    """What no program can do without."""

    flops: float
    bytes: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Which cases; a call has the same number of tokens at every length, and so the same work."""

    heads: tuple[tuple[int, int, int], ...] = tuple(  # H, K and V of the mLSTM's cases
        workloads.MLSTM[name].heads for name in ("7b", "16_heads", "4_heads")
    )
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)  # T of these
    tokens: int = workloads.TOKENS  # of one call, at every length
    slstm: tuple[int, int, int] = (16, 2048, 4)  # B, T and H of the sLSTM's cases
    slstm_dims: tuple[int, ...] = tuple(workload.K for workload in workloads.SLSTM.values())  # K
    decode_batches: tuple[int, ...] = (1, 32, 256)  # of one step at the first heads
    decode_states: int = 32  # at most so many states are decoded one after the other
    dtype: Literal["bfloat16", "float32"] = "bfloat16"


SMOKE: dict[str, Any] = dict(
    heads=((2, 16, 32),),
    lengths=(64, 128),
    tokens=128,
    slstm=(2, 16, 2),
    slstm_dims=(16,),
    decode_batches=(1,),
    decode_states=2,
    dtype="float32",
)
"""Sizes for a CPU."""


def groups(sizes: Sizes, sections: tuple[str, ...]) -> Iterator[list[Case]]:
    """Cases that differ in their part alone, forward before gradient: they share a process."""
    shapes: list[tuple[str, tuple[int, int, int, int, int]]] = []
    for H, K, V in sizes.heads:
        shapes += [("mlstm", (max(1, sizes.tokens // T), T, H, K, V)) for T in sizes.lengths]
    shapes += [("slstm", (*sizes.slstm, K, K)) for K in sizes.slstm_dims]
    shapes += [("decode", (B, 1, *sizes.heads[0])) for B in sizes.decode_batches]
    for section, shape in shapes:
        if section in sections:
            fields: dict[str, Any] = dict(zip("BTHKV", shape, strict=True), dtype=sizes.dtype)
            fields |= dict(op=section, most_states=sizes.decode_states)
            parts = PARTS[:2]
            if section == "decode":
                fields["op"], parts = "mlstm", PARTS[2:]
            yield [Case(part=part, **fields) for part in parts]


def work(case: Case, *, attention: bool = False) -> Work:
    """What the bound counts: kernels of one pass each, states kept on the chip.

    Per token and head, K and V wide, with F the share of a chunk's square that is computed:
    forward 4 K V + 2 F L (K + V) operations, backward 8 K V + 2 F L (3 K + 2 V); of a state the
    backward pass reads, one per chunk is written in the forward pass. The sLSTM's backward keeps
    the gates and, in float32, c, n and m.
    """
    item = ITEM_BYTES[case.dtype]
    if attention:
        return _attention(case, item)
    K, V, times = case.K, case.V, case.tokens * case.H
    gradient = case.part == "gradient"
    if case.op == "slstm":
        flops, moved = 8 * K * K, 5 * K * item
        if gradient:
            flops, moved = 3 * flops, moved + 2 * (12 + 4 * item) * K + 5 * K * item
    elif case.part == "decode":
        flops, moved = 5 * K * V, 8 * K * V + 2 * (K + V) * item
    else:
        L = min(CHUNK, case.T)
        square = (1 + min(SQUARE, L) / L) / 2 * L
        flops, moved = 4 * K * V + 2 * square * (K + V), 2 * (K + V) * item
        if gradient:
            flops += 8 * K * V + 2 * square * (3 * K + 2 * V)
            moved += (4 * K + 3 * V + 2 * K * V / L) * item
    return Work(times * flops, times * moved)


def _attention(case: Case, item: int) -> Work:
    """Of a causal square half is computed; the backward pass has five products to the two."""
    columns = case.attention_heads * ATTENTION_WIDTH
    forward = 2 * case.tokens * case.T * columns
    if case.part == "gradient":
        return Work(3.5 * forward, 12 * case.tokens * columns * item)
    return Work(forward, 4 * case.tokens * columns * item)


def bound_seconds(work: Work, dtype: str, device_kind: str) -> float | None:
    """The least time that a device takes: for products or for memory, whichever is longer.

    Args:
        work: what it has to do.
        dtype: of the operands.
        device_kind: as JAX or the driver reports it; of a device that is not in the table of GPUs
            the result is None.
    """
    device = gpu_by_device_kind(device_kind)
    if device is None:
        return None
    flops = device.flops if dtype == "bfloat16" else device.tf32_flops
    return max(work.flops / flops, work.bytes / device.hbm_bandwidth)
