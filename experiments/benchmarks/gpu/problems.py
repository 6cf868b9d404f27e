"""Random inputs for correctness checks of the ops, with the cells as the reference."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks.gpu.settings import MLSTMCheck, SLSTMCheck
from xlstm_jax import cells, ops

Arrays = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """Inputs of one check, an implementation under test and its reference.

    The loss of a gradient check is a weighted sum of the outputs, with `loss_weights`.
    """

    dtype: str
    inputs: Arrays  # argument name -> float32 array, rounded to `dtype` except for the bias
    state: Any  # initial state, a NamedTuple
    loss_weights: Arrays  # for h and for each leaf in `stabilized`
    stabilized: tuple[str, ...]  # leaves of the state that contain a factor exp(-m)
    flags: dict[str, jax.Array | None]  # `reset`, and `mask`, which is True at valid positions
    tested: Callable[..., Any]  # the implementation under test
    reference: Callable[..., Any]
    float32_inputs: tuple[str, ...] = ()  # float32 for any `dtype`

    def cast_inputs(self) -> dict[str, jax.Array]:
        """The inputs in the dtypes that the tested implementation expects."""
        dtype = jnp.dtype(self.dtype)
        return {
            name: jnp.asarray(x, jnp.float32 if name in self.float32_inputs else dtype)
            for name, x in self.inputs.items()
        }


def random_problem(check: MLSTMCheck | SLSTMCheck, implementation: str) -> Problem:
    """Random inputs with the sizes in `check`; the same check always gives the same inputs."""
    rng = np.random.default_rng([len(check.name), *check.sizes])
    if isinstance(check, MLSTMCheck):
        fields = _mlstm(check, implementation, rng)
    else:
        fields = _slstm(check, implementation, rng)
    B, T, H = check.sizes[:3]
    fields["inputs"] = {
        name: x if name == "b" else round_to(x, check.dtype) for name, x in fields["inputs"].items()
    }
    state = fields["state"]
    weights = {"h": round_to(normal(rng, B, T, H, check.sizes[-1]), check.dtype)}
    weights |= {name: normal(rng, *getattr(state, name).shape) for name in fields["stabilized"]}
    reset = mask = None
    if check.flags:
        reset = jnp.asarray(rng.random((B, T)) < 4 / T)  # four per sequence on average
        mask = jnp.asarray(rng.random((B, T)) < 0.9)
    flags = {"reset": reset, "mask": mask}
    return Problem(dtype=check.dtype, loss_weights=weights, flags=flags, **fields)


def _mlstm(check: MLSTMCheck, implementation: str, rng: np.random.Generator) -> dict[str, Any]:
    B, T, H, K, V = check.sizes
    q, k, v = (normal(rng, B, T, H, size) for size in (K, K, V))
    i, f = (check.gate_scale * normal(rng, B, T, H) for _ in "if")
    state = cells.MLSTMState(normal(rng, B, H, K, V), normal(rng, B, H, K), normal(rng, B, H))
    return {
        "inputs": {"q": q, "k": k, "v": v, "i": i, "f": f + 3},
        "state": state,
        "stabilized": ("C", "n"),
        "tested": _with(ops.mlstm, implementation=implementation, **check.options),
        "reference": _with(cells.mlstm_scan, **check.options),
    }


def _slstm(check: SLSTMCheck, implementation: str, rng: np.random.Generator) -> dict[str, Any]:
    B, T, H, K = check.sizes
    x, r = normal(rng, B, T, 4, H, K), normal(rng, H, K, 4, K) / math.sqrt(K)
    c, n, h, m = normal(rng, 4, B, H, K)
    return {
        "inputs": {"x": x, "r": r, "b": normal(rng, H, 4, K)},
        "state": cells.SLSTMState(c, 1 + abs(n), np.tanh(h), m),
        "stabilized": ("c", "n"),
        "tested": _with(ops.slstm, implementation=implementation),
        "reference": cells.slstm_scan,
        "float32_inputs": ("r", "b"),
    }


def _with(fn: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return lambda **arguments: fn(**arguments, **options)


def normal(rng: np.random.Generator, *shape: int) -> Any:
    """A float32 array of standard normal samples."""
    return rng.standard_normal(shape).astype(np.float32)


def round_to(x: np.ndarray, dtype: str) -> np.ndarray:
    """`x` rounded to `dtype`, as a float32 array."""
    return np.asarray(jnp.asarray(x, jnp.dtype(dtype)).astype(jnp.float32))
