"""Subjects of the property tests: every implementation of every op, and inputs of calls."""

import contextlib
import os
from typing import Any, NamedTuple

import numpy as np
import pytest

from pallas_kernels import common
from xlstm_jax import cells, ops
from xlstm_jax.cells.attention import AttentionState, Rotary
from xlstm_jax.cells.gated_delta import GatedDeltaState
from xlstm_jax.cells.mamba import MambaState
from xlstm_jax.cells.ssd import SSDState
from xlstm_jax.cells.wkv import WKVState
from xlstm_jax.ops.attention import blockwise

DEVICE = os.environ.get("XLSTM_TEST_DEVICE")
"""The option `--device`; None: small sizes on a CPU, and interpreted kernels."""

B, H, K, V = (2, 2, 8, 12) if DEVICE is None else (2, 2, 64, 96)
L = {None: 8, "tpu": 128}.get(DEVICE, 64)  # chunk size of all calls: a tile of the device
KERNELS = ("pallas_tpu", "triton")  # interpreted in tests, so that they run on any device
LENGTHS = (1, L - 1, L, L + 1, 3 * L + 5)
T = LENGTHS[-1]
"""Length of most calls, so that many tests share one compiled program."""
CHUNKED = ("chunkwise", "blockwise", *KERNELS)  # implementations that work in chunks
OPS = ("mlstm", "slstm", "lstm")
PARTIAL = ("decode", "cudnn", "splash")
"""Implementations that support a part of the calls only; see `test_attention.py`."""
BASELINES = ("attention", "selective_scan", "ssd", "gated_delta_rule", "wkv")


class Subject(NamedTuple):
    """One implementation of one variant of an op."""

    variant: str
    implementation: str

    @property
    def op(self) -> str:
        return op_of(self.variant)

    @property
    def is_kernel(self) -> bool:
        """Whether it is a kernel for an accelerator, which tests interpret."""
        return self.implementation in KERNELS

    def tracing_context(self) -> contextlib.AbstractContextManager:
        """The context in which its calls are traced."""
        if self.op == "attention":
            return _blocks_of(L)
        return interpreted() if self.is_kernel else contextlib.nullcontext()

    @property
    def widest_dtype(self) -> str:
        """The widest dtype that it supports."""
        return "float32" if self.is_kernel else "float64"

    def exact(self, dtype: str) -> dict[str, Any]:
        """Options for which properties hold up to rounding: eps is added in units of exp(m)."""
        return {"eps": 0.0} if self.op == "mlstm" and dtype == "float64" else {}

    @property
    def options(self) -> dict[str, Any]:
        return OPTIONS[self.variant]


def op_of(variant: str) -> str:
    """The op of a variant, with which its name begins."""
    return next(op for op in (*OPS, *BASELINES) if f"{variant}_".startswith(f"{op}_"))


@contextlib.contextmanager
def _blocks_of(size: int):
    """Blocks of queries of this size, for which the op has no argument."""
    before, blockwise.BLOCK_SIZE = blockwise.BLOCK_SIZE, size
    yield
    blockwise.BLOCK_SIZE = before


OPTIONS: dict[str, dict[str, Any]] = {
    "mlstm": {},
    "mlstm_exp": {"forget_gate": "exp"},
    "mlstm_sigmoid": {"input_gate": "sigmoid"},
    "mlstm_unnormalized": {"input_gate": "sigmoid", "normalize": False},
    "slstm": {},
    "slstm_exp": {"forget_gate": "exp"},
    "lstm": {},
    "attention": {"window": 64, "rotary": Rotary(100.0, 6)},
    "attention_sinks": {"window": 6, "num_sinks": 2, "rotary": Rotary(100.0)},
    "selective_scan": {},
    "ssd": {},
    "gated_delta_rule": {},
    "wkv": {},
}


PRIMARY = ("mlstm", "slstm", "lstm")
XLSTM = tuple(variant for variant in OPTIONS if op_of(variant) in OPS)
QUICK = tuple(variant for variant in XLSTM if variant != "mlstm_exp")


def implementations(op: str) -> dict[str, str | None]:
    """As `ops.implementations`, with interpreted kernels unless a device is given."""
    with interpreted():
        return ops.implementations(op)


def interpreted() -> contextlib.AbstractContextManager:
    """The context in which kernels are interpreted; on a device they are compiled."""
    return common.interpreted(lanes=L) if DEVICE is None else contextlib.nullcontext()


def subjects(
    *variants: str,
    quick: tuple[str, ...] = QUICK,
    quick_kernels: bool = False,
    only: tuple[str, ...] | None = None,
):
    """Parametrize a test over every implementation of these variants (default: all variants).

    An implementation that cannot run on this machine is skipped with the reason.

    Args:
        variants: names in `OPTIONS`.
        quick: the other variants are marked slow.
        quick_kernels: interpreted kernels are slow, and their variants other than `PRIMARY` run
            in `make test-all` only; if True, kernels are quick and the other variants slow.
        only: the implementations that can differ in the tested property.
    """
    cases = []
    for variant in variants or OPTIONS:
        for name, refusal in implementations(op_of(variant)).items():
            if name in PARTIAL or (only is not None and name not in only):
                continue
            marks = [] if refusal is None else [pytest.mark.skip(reason=refusal)]
            marks += _speed(variant, name, quick, quick_kernels)
            cases.append(pytest.param(Subject(variant, name), id=f"{variant}-{name}", marks=marks))
    return pytest.mark.parametrize("subject", cases)


def _speed(variant: str, name: str, quick: tuple[str, ...], quick_kernels: bool) -> list:
    if op_of(variant) in BASELINES:
        # Their recurrence is the reference itself.
        repeats = name == "recurrent" or (op_of(variant), name) == ("attention", "parallel")
        if variant in quick:
            return [pytest.mark.slow] if repeats else []
        return [pytest.mark.exhaustive if repeats else pytest.mark.slow]
    if name not in KERNELS:
        return [] if variant in quick else [pytest.mark.slow]
    is_primary = variant in PRIMARY
    if quick_kernels:
        return [] if is_primary else [pytest.mark.slow]
    return [pytest.mark.slow if is_primary else pytest.mark.exhaustive]


# Positive input gates between 1e3 and 1e30 are left out: next to them float32 rounds log f away.
RANGE_I = [-np.inf, -1e31, -1e29, -1e9, -1e5, -1e3, -100, 30, 1e3, 1e30]
RANGE_F = [-np.inf, -1e29, -1e9, -1e6, -1e5, -1e4, -1e3, -100, 30, 1e3, 1e29, np.inf]
# Of an exponential forget gate: log f = -1e29 would make 1e30 depend on the order of rounded sums.
RANGE_LOG_F = [x for x in RANGE_F if x < 0 and x != -1e29] + [30, 1e3, 1e30]


def replace_third(rng: np.random.Generator, gate: np.ndarray, values: list[float]):
    """Replaces a third of the elements of `gate`, in place, by random elements of `values`."""
    replaced = rng.random(gate.shape) < 1 / 3
    gate[replaced] = np.float32(rng.choice(values, replaced.sum()))


both_dtypes = pytest.mark.parametrize("dtype", ["float32", "float64"])


class Case(NamedTuple):
    """Arguments of one call, as float64 arrays whose values are exact in float32."""

    inputs: dict[str, np.ndarray]  # B T ...
    weights: dict[str, np.ndarray]
    state: Any
    reset: np.ndarray | None = None
    mask: np.ndarray | None = None

    @property
    def length(self) -> int:
        return next(iter(self.inputs.values())).shape[1]

    def slice(self, start: int, stop: int) -> "Case":
        """The positions [start, stop)."""
        inputs = {name: x[:, start:stop] for name, x in self.inputs.items()}
        flags = (None if x is None else x[:, start:stop] for x in (self.reset, self.mask))
        return Case(inputs, self.weights, self.state, *flags)


def make_case(variant: str, length: int, *, gate_scale: float = 1.0, seed: int = 0) -> Case:
    """Random inputs with a state; `gate_scale` multiplies the pre-activations of all gates."""
    rng = np.random.default_rng([seed, length])

    def normal(*shape, scale=1.0, shift=0.0):
        return _rounded(scale * rng.standard_normal(shape) + shift)

    if variant.startswith("mlstm"):
        shift = -1.0 if variant == "mlstm_exp" else 3.0  # f is mostly, but not always, below 1
        inputs = {
            "q": normal(B, length, H, K),
            "k": normal(B, length, H, K),
            "v": normal(B, length, H, V),
            "i": normal(B, length, H, scale=gate_scale),
            "f": normal(B, length, H, scale=gate_scale, shift=shift),
        }
        state = cells.MLSTMState(normal(B, H, K, V), normal(B, H, K), normal(B, H))
        return Case(inputs, {}, state)
    if op_of(variant) in BASELINES:
        return _baseline_case(variant, length, normal, gate_scale)
    x = normal(B, length, 4, H, K, scale=gate_scale)
    weights = {"r": normal(H, K, 4, K, scale=0.5 * K**-0.5), "b": normal(H, 4, K, scale=0.5)}
    c, h, m = normal(B, H, K, scale=0.5), normal(B, H, K, scale=0.3), normal(B, H, K)
    n = _rounded(1.0 + np.abs(normal(B, H, K)))
    state = cells.LSTMState(c, h) if variant == "lstm" else cells.SLSTMState(c, n, h, m)
    return Case({"x": x}, weights, state)


def _baseline_case(variant: str, length: int, normal: Any, gate_scale: float) -> Case:
    """Heads of values are twice the groups of keys; the inner width F is H * V."""
    positive = lambda *shape: _rounded(np.logaddexp(0, gate_scale * normal(*shape)))  # noqa: E731
    F = H * V
    if variant == "selective_scan":
        x, dt, B_, C = (
            normal(B, length, F),
            positive(B, length, F),
            *(normal(B, length, K) for _ in range(2)),
        )
        weights = {"A": -positive(F, K), "D": normal(F)}
        return Case({"x": x, "dt": dt, "B": B_, "C": C}, weights, MambaState(normal(B, F, K)))
    if variant == "wkv":
        weights = {"log_decay": -positive(F), "bonus": normal(F)}
        inputs = {"k": normal(B, length, F, scale=gate_scale), "v": normal(B, length, F)}
        n = _rounded(1.0 + np.abs(normal(B, F)))
        return Case(inputs, weights, WKVState(normal(B, F), n, normal(B, F)))
    q, k = (normal(B, length, H, K) for _ in range(2))
    if op_of(variant) == "attention":
        options = OPTIONS[variant]
        S = options["window"] + options.get("num_sinks", 0)
        inputs = {"q": normal(B, length, 2 * H, K), "k": k, "v": normal(B, length, H, V)}
        # A float: an integer has no gradient. `runs` converts it.
        filled = np.array([3.0, 11.0])
        state = AttentionState(normal(B, H, S, K), normal(B, H, S, V), filled)
        return Case(inputs, {}, state)
    v = normal(B, length, 2 * H, V)
    if variant == "ssd":
        inputs = {"x": v, "dt": positive(B, length, 2 * H), "B": k, "C": q}
        weights = {"A": -positive(2 * H), "D": normal(2 * H)}
        return Case(inputs, weights, SSDState(normal(B, 2 * H, K, V)))
    k = _rounded(k / np.linalg.norm(k, axis=-1, keepdims=True))
    beta = _rounded(1 / (1 + np.exp(normal(B, length, 2 * H))))
    decay = {"log_decay": -positive(B, length, 2 * H), "beta": beta}
    inputs = {"q": q, "k": k, "v": v, **decay}
    return Case(inputs, {}, GatedDeltaState(normal(B, 2 * H, K, V)))


def from_initial_state(case: Case) -> Case:
    """The same call from the initial state."""
    zeros = type(case.state)(*(np.zeros_like(leaf) for leaf in case.state))
    return case._replace(state=zeros)


def with_flags(case: Case, *, num_masked: int, seed: int = 0) -> Case:
    """The same call with resets and masked steps at random positions.

    Every sequence has `num_masked` masked steps, also in its interior; some resets are masked.
    """
    rng = np.random.default_rng([seed, case.length, 1])
    reset = rng.random((B, case.length)) < 0.2
    mask = np.ones((B, case.length), bool)
    for sequence in mask:
        sequence[rng.choice(case.length, num_masked, replace=False)] = False
    return case._replace(reset=reset, mask=mask)


def drop_masked(case: Case) -> Case:
    """The call without masked steps and their resets; sequences must have equal numbers of them."""
    drop = lambda x: np.stack([a[valid] for a, valid in zip(x, case.mask, strict=True)])  # noqa: E731
    inputs = {name: drop(x) for name, x in case.inputs.items()}
    reset = drop(case.reset)
    return case._replace(inputs=inputs, reset=reset, mask=np.ones_like(reset))


def pad(case: Case, length: int) -> Case:
    """The same call padded with masked steps at the end, up to `length`."""
    defaults = np.zeros((B, case.length), bool), np.ones((B, case.length), bool)
    reset, mask = (
        default if flag is None else flag
        for flag, default in zip((case.reset, case.mask), defaults, strict=True)
    )
    inputs = {name: pad_time(x, length) for name, x in case.inputs.items()}
    return case._replace(inputs=inputs, reset=pad_time(reset, length), mask=pad_time(mask, length))


def pad_time(x: np.ndarray, length: int) -> np.ndarray:
    """`x` padded with zeros at the end, up to `length` steps."""
    return np.pad(x, ((0, 0), (0, length - x.shape[1])) + ((0, 0),) * (x.ndim - 2))


def _rounded(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float32).astype(np.float64)
