"""What the mLSTM layers of both generations have in common: the options of their cell."""

import dataclasses
from typing import ClassVar, Literal

from xlstm_jax import ops
from xlstm_jax.cells import MLSTMState, mlstm_init
from xlstm_jax.modules.checks import check_at_least, check_choice
from xlstm_jax.ops.registry import TABLES
from xlstm_jax.typing import Array, Bool, Float


@dataclasses.dataclass(frozen=True, kw_only=True)
class CellConfig:
    """Heads and numerics of an mLSTM cell; the arguments of `ops.mlstm` by their names."""

    FIELD: ClassVar[str]  # of LMConfig, to name in errors

    num_heads: int = 4  # H
    input_gate: Literal["exp", "sigmoid"] = "exp"
    normalize: bool = True  # False needs the sigmoid input gate
    forget_bias: tuple[float, float] = (3.0, 6.0)  # first and last head: memories of many lengths
    eps: float = 1e-6  # added to the normaliser
    chunk_size: int | None = None  # L; speed only, None lets the op choose
    implementation: str = "auto"

    def __post_init__(self):
        # An exponential input gate without a normaliser grows without bound.
        gates = ("exp", "sigmoid") if self.normalize else ("sigmoid",)
        condition = "" if self.normalize else " with normalize=False"
        check_choice(f"{self.FIELD}.input_gate{condition}", self.input_gate, gates)
        names = ("auto", *TABLES["mlstm"])
        check_choice(f"{self.FIELD}.implementation", self.implementation, names)
        if self.chunk_size is not None:
            check_at_least(f"{self.FIELD}.chunk_size", self.chunk_size, 1)

    def run(
        self,
        q: Float[Array, "B T QK"],
        k: Float[Array, "B T QK"],
        v: Float[Array, "B T F"],
        i: Float[Array, "B T H"],
        f: Float[Array, "B T H"],
        state: MLSTMState | None,
        *,
        reset: Bool[Array, "B T"] | None,
        mask: Bool[Array, "B T"] | None,
    ) -> tuple[Float[Array, "B T H V"], MLSTMState]:
        """`ops.mlstm` with these options, on projections whose heads are still joined."""
        q, k, v = (x.reshape(*x.shape[:2], self.num_heads, -1) for x in (q, k, v))
        return ops.mlstm(
            q,
            k,
            v,
            i,
            f,
            state,
            reset=reset,
            mask=mask,
            input_gate=self.input_gate,
            normalize=self.normalize,
            eps=self.eps,
            chunk_size=self.chunk_size,
            implementation=self.implementation,
        )

    def empty(self, batch_size: int, qk_dim: int, v_dim: int) -> MLSTMState:
        """The empty memory, for widths of all heads together."""
        H = self.num_heads
        return mlstm_init(batch_size, H, qk_dim // H, v_dim // H)
