"""Cases of the kernel benchmark, and lower bounds of their times."""

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from pallas_kernels.hardware import gpu_by_device_kind
from tests import workloads

PARTS = ("forward", "gradient", "decode")
ITEM_BYTES = {"bfloat16": 2, "float32": 4}
ATTENTION_WIDTH = 128
"""Head size of attention, whose heads together are as wide as the values of the mLSTM."""

CHUNK, SQUARE = 256, 64
"""In the bound of the mLSTM: chunk length, and side of the squares skipped above the diagonal."""

CACHED_BYTES = 256 << 20
"""More than any last-level cache: a decode step is timed on as many states as fill this."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One call: sizes of the arrays, and the part of the computation that is timed."""

    op: str  # "mlstm" or "slstm"
    part: str  # one of `PARTS`; "gradient" is forward and backward
    B: int
    T: int
    H: int
    K: int
    V: int
    dtype: str = "bfloat16"
    max_states: int = 32  # that a decode step is timed on

    @property
    def tokens(self) -> int:
        """Tokens of the batch."""
        return self.B * self.T

    @property
    def section(self) -> str:
        """Section of the benchmark: "mlstm", "slstm" or "decode"."""
        return "decode" if self.part == "decode" else self.op

    @property
    def attention_heads(self) -> int:
        """Heads of attention, when it replaces the mLSTM."""
        return max(1, self.H * self.V // ATTENTION_WIDTH)

    @property
    def num_states(self) -> int:
        """States that a decode step is timed on, one after another, as those of layers."""
        if self.part != "decode":
            return 1
        elements = 4 * self.K if self.op == "slstm" else self.K * self.V
        return max(1, min(self.max_states, CACHED_BYTES // (4 * self.B * self.H * elements)))


class Work(NamedTuple):
    """Least work of a call."""

    flops: float
    bytes: float  # of memory traffic


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of all cases; a call has the same number of tokens at every sequence length."""

    heads: tuple[tuple[int, int, int], ...] = tuple(  # H, K and V of the mLSTM cases
        workloads.MLSTM[name].heads for name in ("7b", "16_heads", "4_heads")
    )
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)  # T of the mLSTM
    tokens: int = workloads.TOKENS  # per call, at every length
    slstm: tuple[int, int, int] = (16, 2048, 4)  # B, T and H of the sLSTM cases
    slstm_dims: tuple[int, ...] = tuple(workload.K for workload in workloads.SLSTM.values())  # K
    decode_batches: tuple[int, ...] = (1, 32, 256)  # B of decode steps, at the first of `heads`
    decode_states: int = 32  # upper limit of `Case.num_states`
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
    """Groups of cases that differ only in their part, forward before gradient, for one process."""
    shapes: list[tuple[str, tuple[int, int, int, int, int]]] = []
    for H, K, V in sizes.heads:
        shapes += [("mlstm", (max(1, sizes.tokens // T), T, H, K, V)) for T in sizes.lengths]
    shapes += [("slstm", (*sizes.slstm, K, K)) for K in sizes.slstm_dims]
    shapes += [("decode", (B, 1, *sizes.heads[0])) for B in sizes.decode_batches]
    for section, shape in shapes:
        if section in sections:
            fields: dict[str, Any] = dict(zip("BTHKV", shape, strict=True), dtype=sizes.dtype)
            fields |= dict(op=section, max_states=sizes.decode_states)
            parts = PARTS[:2]
            if section == "decode":
                fields["op"], parts = "mlstm", PARTS[2:]
            yield [Case(part=part, **fields) for part in parts]


def work(case: Case, *, attention: bool = False) -> Work:
    """Work that the bound counts: one pass per direction, with states in on-chip memory.

    mLSTM, per token and head, with F the fraction of a chunk's square that is computed: forward
    4 K V + 2 F L (K + V) operations, backward 8 K V + 2 F L (3 K + 2 V). For the backward pass the
    forward pass saves one state per chunk. The sLSTM saves the gates and, in float32, c, n and m.
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
    """Causal: half of the square. The backward pass has five products, the forward pass two."""
    columns = case.attention_heads * ATTENTION_WIDTH
    forward = 2 * case.tokens * case.T * columns
    if case.part == "gradient":
        return Work(3.5 * forward, 12 * case.tokens * columns * item)
    return Work(forward, 4 * case.tokens * columns * item)


def bound_seconds(work: Work, dtype: str, device_kind: str) -> float | None:
    """Lower bound of the time on a device: of the products or of the memory traffic.

    Args:
        work: of the call.
        dtype: of the operands.
        device_kind: as JAX or the driver reports it.

    Returns:
        The larger of both bounds; None for a device that is not in the table of GPUs.
    """
    device = gpu_by_device_kind(device_kind)
    if device is None:
        return None
    flops = device.flops if dtype == "bfloat16" else device.tf32_flops
    return max(work.flops / flops, work.bytes / device.hbm_bandwidth)
