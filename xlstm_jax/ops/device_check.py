"""Checks every implementation of the recurrent ops on this device, against the recurrence."""

import concurrent.futures
import contextvars
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from xlstm_jax.ops import dispatch
from xlstm_jax.ops.mlstm.api import mlstm
from xlstm_jax.ops.registry import TABLES
from xlstm_jax.ops.slstm.api import slstm

REFERENCE = "recurrent"

LIMITS = {"float32": 2e-3, "bfloat16": 3e-2}
"""Largest relative errors, as root mean squares. A wrong kernel is off by far more."""

REPEATS = 5


class Workload(NamedTuple):
    """A call of an op; V is that of the mLSTM."""

    op: str
    B: int
    T: int
    H: int
    K: int
    V: int
    dtype: str
    with_state: bool = True  # the loss depends on the last state; in training it does not

    @property
    def label(self) -> str:
        """Sizes and dtype, for tables."""
        widths = f"({self.K}, {self.V})" if self.op == "mlstm" else f"{self.K}"
        return f"{self.B} x {self.T}, {self.H} heads of {widths}, {self.dtype}"


class Outcome(NamedTuple):
    """What an implementation computed for a workload."""

    implementation: str
    workload: Workload
    error: float  # largest relative error of h, the state and the gradients; NaN if it failed
    of: str  # which of them has it; the error message if it failed
    milliseconds: float  # median of forward and backward pass; NaN if not measured

    @property
    def passed(self) -> bool:
        """Whether the error is below the limit of the dtype."""
        return self.error <= LIMITS[self.workload.dtype]


def workloads(platform: str) -> list[Workload]:
    """Calls that show most mistakes: padded and full tiles, both dtypes; few, as they compile."""
    if platform == "cpu":
        sizes = [(1, 200, 2, 24, 40, "float32"), (1, 200, 2, 64, 128, "bfloat16")]
    else:
        sizes = [
            (2, 300, 2, 64, 96, "float32"),
            (2, 300, 2, 40, 96, "bfloat16"),
            (1, 2048, 8, 256, 512, "bfloat16"),
        ]
    mlstms = [Workload("mlstm", *shape) for shape in sizes]
    if platform == "gpu":  # long enough for the sequence split
        mlstms.append(Workload("mlstm", 1, 8192, 4, 64, 128, "bfloat16", with_state=False))
    return mlstms + [Workload("slstm", B, T, H, K, K, dtype) for B, T, H, K, _, dtype in sizes]


def check(platform: str) -> Iterator[Outcome]:
    """The outcomes of every implementation that supports a workload, except the reference.

    All programs are compiled first, at the same time; then they run one after the other.
    """
    calls = [(workload, _names(workload, platform)) for workload in workloads(platform)]
    calls = [(workload, names) for workload, names in calls if names]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        programs = {
            (workload, name): pool.submit(contextvars.copy_context().run, _compile, workload, name)
            for workload, names in calls
            for name in (REFERENCE, *names)
        }
    for workload, names in calls:
        arguments = _arguments(workload)
        exact = jax.device_get(programs[workload, REFERENCE].result()(*_widened(arguments)))
        for name in names:
            yield _outcome(name, workload, programs[workload, name], arguments, exact)


def _names(workload: Workload, platform: str) -> list[str]:
    """The implementations that support a workload, except the reference."""
    sizes = (workload.B, workload.T, workload.H, workload.K, workload.V)
    dtype = jnp.dtype(workload.dtype)
    call = dispatch.Call(*sizes, dtype, platform, named=True)
    entries = TABLES[workload.op].items()
    return [name for name, x in entries if name != REFERENCE and x.unsupported(call) is None]


def verdicts(outcomes: list[Outcome]) -> dict[str, dict[str, Any]]:
    """Op -> implementation -> verdict, for `ops.verdicts.record`."""
    results: dict[str, dict[str, Any]] = {}
    for op in dict.fromkeys(one.workload.op for one in outcomes):
        mine = [one for one in outcomes if one.workload.op == op]
        names = list(dict.fromkeys(one.implementation for one in mine))
        results[op] = {
            name: _verdict([one for one in mine if one.implementation == name], mine)
            for name in names
        }
    return results


def _verdict(own: list[Outcome], all_of_op: list[Outcome]) -> dict[str, Any]:
    failed = [one for one in own if not one.passed]
    reason = ""
    if failed:
        one = failed[0]
        what = one.of if np.isnan(one.error) else f"error {one.error:.1e} of {one.of}"
        reason = f"{one.workload.label}: {what}"
    is_fastest = all(
        one.milliseconds < other.milliseconds
        for one in own
        for other in all_of_op
        if other.passed
        and other.workload == one.workload
        and other.implementation != one.implementation
    )
    return {
        "passed": not failed,
        "reason": reason,
        "fastest": not failed and is_fastest,
        "milliseconds": {one.workload.label: one.milliseconds for one in own},
    }


def _compile(workload: Workload, name: str) -> Callable[..., dict[str, jax.Array]]:
    """The compiled results of an implementation; the reference takes float32."""
    shapes = jax.eval_shape(functools.partial(_arguments, workload))
    if name != REFERENCE:
        return jax.jit(functools.partial(_evaluate, workload, name)).lower(*shapes).compile()
    with jax.default_matmul_precision("highest"):
        compute = jax.jit(functools.partial(_evaluate, workload, name))
        return compute.lower(*jax.eval_shape(_widened, shapes)).compile()


def _outcome(
    name: str, workload: Workload, program: concurrent.futures.Future, arguments, expected
) -> Outcome:
    try:
        compute = program.result()
        actual = jax.device_get(compute(*arguments))
        errors = {key: _relative_error(actual[key], expected[key]) for key in expected}
        worst = max(errors, key=lambda key: np.nan_to_num(errors[key], nan=np.inf))
        error = float(np.nan_to_num(errors[worst], nan=np.inf))
        return Outcome(name, workload, error, worst, _time(compute, arguments))
    except Exception as failure:  # a kernel may fail in any way, and the others are still checked
        lines = str(failure).strip().splitlines() or [""]
        message = f"{type(failure).__name__}: {lines[0][:200]}"
        return Outcome(name, workload, float("nan"), message, float("nan"))


def _widened(arguments: Any) -> Any:
    """The same numbers in float32."""
    return jax.tree.map(
        lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, arguments
    )


def _arguments(workload: Workload) -> tuple[Any, ...]:
    """Random inputs, resets, and weights of the loss."""
    rng = np.random.default_rng(0)
    B, T, H, K, V, dtype = workload[1:7]

    def normal(*shape, scale=1.0, shift=0.0):
        return jnp.asarray(scale * rng.standard_normal(shape) + shift, dtype)

    if workload.op == "mlstm":
        inputs = (normal(B, T, H, K), normal(B, T, H, K), normal(B, T, H, V))
        inputs += (normal(B, T, H), normal(B, T, H, shift=3.0))
    else:
        inputs = (normal(B, T, 4, H, K), normal(H, K, 4, K, scale=K**-0.5))
    reset = rng.random((B, T)) < 2 / T
    reset[:, T // 3] = True  # one in every sequence, and more at random
    return inputs, jnp.asarray(reset), normal(B, T, H, V if workload.op == "mlstm" else K)


def _evaluate(workload: Workload, name: str, inputs, reset, weights) -> dict[str, jax.Array]:
    """h, the leaves of the last state, and the gradients of a loss of all of them."""
    op = mlstm if workload.op == "mlstm" else slstm

    def loss(inputs):
        h, state = op(*inputs, reset=reset, implementation=name)
        # Weighted by m, the scale of C and n, whatever m an implementation chooses.
        C, n = _unscaled(workload.op, state)
        total = jnp.sum(h.astype(jnp.float32) * weights.astype(jnp.float32))
        if workload.with_state:
            total += jnp.sum(jnp.tanh(C)) + jnp.sum(jnp.tanh(n))
        return total, (h, C, n)

    (_, (h, C, n)), grads = jax.value_and_grad(loss, has_aux=True)(inputs)
    named = {"h": h, "C": C, "n": n}
    return named | {f"gradient {i}": x for i, x in enumerate(grads)}


def _unscaled(op: str, state) -> tuple[jax.Array, jax.Array]:
    scale = jnp.exp(jnp.minimum(state.m, 30.0))
    if op == "mlstm":
        return state.C * scale[..., None, None], state.n * scale[..., None]
    return state.c * scale, state.n * scale


def _relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return float(np.sqrt(np.mean((actual - expected) ** 2) / (np.mean(expected**2) + 1e-30)))


def _time(compute, arguments) -> float:
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(compute(*arguments))
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)
