"""What the benchmark of kernels computes, at which sizes, and the least that it could take."""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

from pallas_kernels.hardware import Gpu

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
        """Positions of all rows."""
        return self.B * self.T

    @property
    def heads(self) -> str:
        """For people: "8 x (256, 512)", or of an sLSTM "4 x 256"."""
        return f"{self.H} x {self.K}" if self.op == "slstm" else f"{self.H} x ({self.K}, {self.V})"

    @property
    def attention_heads(self) -> int:
        """Of attention in its place."""
        return max(1, self.H * self.V // ATTENTION_WIDTH)

    @property
    def num_states(self) -> int:
        """Memories that a decode step is timed on, one after the other, as of layers."""
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
    """Which cases; tokens of a call are the same at every length, so that work is, too."""

    heads: tuple[tuple[int, int, int], ...] = ((8, 256, 512), (16, 128, 256), (4, 64, 128))
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
    tokens: int = 65536
    slstm_widths: tuple[int, ...] = (64, 128, 256, 512)
    slstm_heads: int = 4
    slstm_batch: int = 16
    slstm_length: int = 2048
    decode_heads: tuple[int, int, int] = (8, 256, 512)
    decode_batches: tuple[int, ...] = (1, 32, 256)
    decode_states: int = 32
    dtype: str = "bfloat16"


SMOKE = Sizes(
    heads=((2, 16, 32),),
    lengths=(64, 128),
    tokens=128,
    slstm_widths=(16,),
    slstm_heads=2,
    slstm_batch=2,
    slstm_length=16,
    decode_heads=(2, 16, 32),
    decode_batches=(1,),
    decode_states=2,
    dtype="float32",
)


def groups(sizes: Sizes, sections: tuple[str, ...]) -> Iterator[list[Case]]:
    """Cases that differ in their part alone, forward before gradient: they share a process."""
    rest: dict[str, Any] = {"dtype": sizes.dtype}
    if "mlstm" in sections:
        for H, K, V in sizes.heads:
            for T in sizes.lengths:
                shape = dict(B=max(1, sizes.tokens // T), T=T, H=H, K=K, V=V)
                yield [Case(op="mlstm", part=part, **shape, **rest) for part in PARTS[:2]]
    if "slstm" in sections:
        for K in sizes.slstm_widths:
            shape = dict(B=sizes.slstm_batch, T=sizes.slstm_length, H=sizes.slstm_heads, K=K, V=K)
            yield [Case(op="slstm", part=part, **shape, **rest) for part in PARTS[:2]]
    if "decode" in sections:
        H, K, V = sizes.decode_heads
        for B in sizes.decode_batches:
            shape = dict(B=B, T=1, H=H, K=K, V=V, most_states=sizes.decode_states)
            yield [Case(op="mlstm", part="decode", **shape, **rest)]


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


def bound_seconds(found: Work, dtype: str, device: Gpu) -> float:
    """The time below which `device` cannot do it: products or memory, whichever takes longer."""
    flops = device.flops if dtype == "bfloat16" else device.tf32_flops
    return max(found.flops / flops, found.bytes / device.hbm_bandwidth)
