"""What properties are tested on: every implementation of every op, and the inputs of calls."""

import contextlib
from typing import Any, NamedTuple

import numpy as np
import pytest

from pallas_kernels import common
from xlstm_jax import cells, ops

B, H, K, V = 2, 2, 8, 12
L = 8  # the chunk of every chunkwise call here
KERNELS = ("pallas_tpu", "triton")  # those that an interpreter runs on any device
LENGTHS = (1, L - 1, L, L + 1, 3 * L + 5)
T = LENGTHS[-1]
"""The length of most calls, so that one compiled program serves many tests."""
CHUNKED = ("chunkwise", *KERNELS)  # those that compute several steps at once


class Subject(NamedTuple):
    """One implementation of one variant of an op."""

    variant: str
    implementation: str

    @property
    def op(self) -> str:
        return self.variant.split("_")[0]

    @property
    def is_kernel(self) -> bool:
        """Whether it is written for a device that is not here, so that tests interpret it."""
        return self.implementation in KERNELS

    def where_it_runs(self) -> contextlib.AbstractContextManager:
        """What its calls are traced in."""
        if not self.is_kernel:
            return contextlib.nullcontext()
        return common.interpreted(lanes=L)

    @property
    def widest(self) -> str:
        """The widest dtype it computes in."""
        return "float32" if self.is_kernel else "float64"

    def exact(self, dtype: str) -> dict[str, Any]:
        """Options under which properties hold to rounding: eps is added in units of exp(m)."""
        return {"eps": 0.0} if self.op == "mlstm" and dtype == "float64" else {}

    @property
    def options(self) -> dict[str, Any]:
        return OPTIONS[self.variant]


OPTIONS: dict[str, dict[str, Any]] = {
    "mlstm": {},
    "mlstm_sigmoid": {"input_gate": "sigmoid"},
    "mlstm_unnormalized": {"input_gate": "sigmoid", "normalize": False},
    "slstm": {},
    "slstm_exp": {"forget_gate": "exp"},
    "lstm": {},
}


PRIMARY = ("mlstm", "slstm", "lstm")


def implementations(op: str) -> dict[str, str | None]:
    """As `ops.implementations`, where kernels are interpreted."""
    with common.interpreted(lanes=L):
        return ops.implementations(op)


def subjects(
    *variants: str,
    quick: tuple[str, ...] = tuple(OPTIONS),
    quick_kernels: bool = False,
    among: tuple[str, ...] | None = None,
):
    """A decorator: the test runs on every implementation of these variants (none named: of all).

    An implementation that cannot run here is skipped with its reason; variants that are not
    `quick` run among the slow tests, and so do kernels, which are interpreted. With `quick_kernels`
    they are quick, and their other variants slow; else those are for `make test-all`. `among`: the
    implementations that differ in what is tested.
    """
    cases = []
    for variant in variants or OPTIONS:
        for name, refusal in implementations(variant.split("_")[0]).items():
            if among is not None and name not in among:
                continue
            marks = [] if refusal is None else [pytest.mark.skip(reason=refusal)]
            marks += _speed(variant, name, quick, quick_kernels)
            cases.append(pytest.param(Subject(variant, name), id=f"{variant}-{name}", marks=marks))
    return pytest.mark.parametrize("subject", cases)


def _speed(variant: str, name: str, quick: tuple[str, ...], quick_kernels: bool) -> list:
    if name not in KERNELS:
        return [] if variant in quick else [pytest.mark.slow]
    rare = variant not in PRIMARY
    if quick_kernels:
        return [pytest.mark.slow] if rare else []
    return [pytest.mark.exhaustive if rare else pytest.mark.slow]


both_dtypes = pytest.mark.parametrize("dtype", ["float32", "float64"])


class Case(NamedTuple):
    """Arguments of one call, as float64 arrays whose values float32 holds exactly."""

    inputs: dict[str, np.ndarray]  # B T ...
    weights: dict[str, np.ndarray]
    state: Any
    reset: np.ndarray | None = None
    mask: np.ndarray | None = None

    @property
    def length(self) -> int:
        return next(iter(self.inputs.values())).shape[1]

    def span(self, start: int, stop: int) -> "Case":
        """The steps from `start` to before `stop`."""
        cut = {name: x[:, start:stop] for name, x in self.inputs.items()}
        flags = (None if x is None else x[:, start:stop] for x in (self.reset, self.mask))
        return Case(cut, self.weights, self.state, *flags)


def make_case(variant: str, length: int, *, gate_scale: float = 1.0, seed: int = 0) -> Case:
    """Random inputs with a state; `gate_scale` multiplies the pre-activations of all gates."""
    rng = np.random.default_rng([seed, length])

    def normal(*shape, scale=1.0, shift=0.0):
        return _rounded(scale * rng.standard_normal(shape) + shift)

    if variant.startswith("mlstm"):
        inputs = {
            "q": normal(B, length, H, K),
            "k": normal(B, length, H, K),
            "v": normal(B, length, H, V),
            "i": normal(B, length, H, scale=gate_scale),
            "f": normal(B, length, H, scale=gate_scale, shift=3.0),
        }
        state = cells.MLSTMState(normal(B, H, K, V), normal(B, H, K), normal(B, H))
        return Case(inputs, {}, state)
    x = normal(B, length, 4, H, K, scale=gate_scale)
    weights = {"r": normal(H, K, 4, K, scale=0.5 * K**-0.5), "b": normal(H, 4, K, scale=0.5)}
    c, h, m = normal(B, H, K, scale=0.5), normal(B, H, K, scale=0.3), normal(B, H, K)
    n = _rounded(1.0 + np.abs(normal(B, H, K)))
    state = cells.LSTMState(c, h) if variant == "lstm" else cells.SLSTMState(c, n, h, m)
    return Case({"x": x}, weights, state)


def empty(case: Case) -> Case:
    """The same call from the empty memory."""
    zeros = type(case.state)(*(np.zeros_like(leaf) for leaf in case.state))
    return case._replace(state=zeros)


def with_flags(case: Case, *, num_masked: int, seed: int = 0) -> Case:
    """The same call with resets and masked steps at random positions.

    Every row has `num_masked` masked steps; some resets are masked, some interior steps too.
    """
    rng = np.random.default_rng([seed, case.length, 1])
    reset = rng.random((B, case.length)) < 0.2
    mask = np.ones((B, case.length), bool)
    for row in mask:
        row[rng.choice(case.length, num_masked, replace=False)] = False
    return case._replace(reset=reset, mask=mask)


def take_out_masked(case: Case) -> Case:
    """The call without its masked steps and their resets; each row must have as many."""
    keep = lambda x: np.stack([row[kept] for row, kept in zip(x, case.mask, strict=True)])  # noqa: E731
    inputs = {name: keep(x) for name, x in case.inputs.items()}
    reset = keep(case.reset)
    return case._replace(inputs=inputs, reset=reset, mask=np.ones_like(reset))


def pad(case: Case, length: int) -> Case:
    """The same call with masked steps behind it, up to `length`."""
    flags = np.zeros((B, case.length), bool), np.ones((B, case.length), bool)
    reset, mask = (
        default if given is None else given
        for given, default in zip((case.reset, case.mask), flags, strict=True)
    )
    inputs = {name: pad_time(x, length) for name, x in case.inputs.items()}
    return case._replace(inputs=inputs, reset=pad_time(reset, length), mask=pad_time(mask, length))


def pad_time(x: np.ndarray, length: int) -> np.ndarray:
    """Zeros behind `x`, up to `length` steps."""
    return np.pad(x, ((0, 0), (0, length - x.shape[1])) + ((0, 0),) * (x.ndim - 2))


def _rounded(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32).astype(np.float64)
