"""Argument groups of the op `mlstm`, passed to its implementations."""

from typing import NamedTuple

from xlstm_jax.cells.mlstm import MLSTMState
from xlstm_jax.typing import Array, Float


class Inputs(NamedTuple):
    """Queries, keys, values and gate pre-activations."""

    q: Float[Array, "B T H K"]
    k: Float[Array, "B T H K"]
    v: Float[Array, "B T H V"]
    i: Float[Array, "B T H"]
    f: Float[Array, "B T H"]


INPUT_AXES = Inputs._make(("B T H K", "B T H K", "B T H V", "B T H", "B T H"))
STATE_AXES = MLSTMState._make(("B H K V", "B H K", "B H"))


class Options(NamedTuple):
    """Static options; hashable, as a non-differentiable argument of a `custom_vjp` must be."""

    input_gate: str = "exp"
    forget_gate: str = "sigmoid"
    normalize: bool = True
    eps: float = 1e-6
    chunk_size: int | None = None
    stabilize: bool = True

    @property
    def gates(self) -> dict[str, str]:
        """Activations of the gates, as keyword arguments of `gates.log_gates`."""
        return {"input_gate": self.input_gate, "forget_gate": self.forget_gate}

    @property
    def max_state(self) -> bool:
        """Whether m is the running maximum of the gates; if both are a sigmoid, it is 0."""
        return self.stabilize and "exp" in (self.input_gate, self.forget_gate)

    @property
    def open_forget_gate(self) -> float:
        """The pre-activation of a forget gate of 1."""
        return 0.0 if self.forget_gate == "exp" else 1e30
