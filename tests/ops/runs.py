"""Running a call: values, final state and all gradients of an implementation or the reference.

Every program is compiled once per implementation, options and shapes, and shared by all tests.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import quick
from tests.ops import tolerances
from tests.ops.subjects import LENGTHS, Case, L, Subject, op_of, pad, pad_time
from tests.ops.tolerances import Tolerances
from xlstm_jax import cells, ops
from xlstm_jax.cells.attention import attention_scan
from xlstm_jax.cells.gated_delta import gated_delta_scan
from xlstm_jax.cells.logspace import state_dtype
from xlstm_jax.cells.mamba import mamba_scan
from xlstm_jax.cells.ssd import ssd_scan
from xlstm_jax.cells.wkv import wkv_scan

OPS = {
    "mlstm": ops.mlstm,
    "slstm": ops.slstm,
    "lstm": ops.lstm,
    "attention": ops.attention,
    "selective_scan": ops.selective_scan,
    "ssd": ops.ssd,
    "gated_delta_rule": ops.gated_delta_rule,
    "wkv": ops.wkv,
}
REFERENCES = {
    "mlstm": cells.mlstm_scan,
    "slstm": cells.slstm_scan,
    "lstm": cells.lstm_scan,
    "attention": attention_scan,
    "selective_scan": mamba_scan,
    "ssd": ssd_scan,
    "gated_delta_rule": gated_delta_scan,
    "wkv": wkv_scan,
}
IN_CHUNKS = ("mlstm", "selective_scan", "ssd", "gated_delta_rule")
"""Ops with an argument `chunk_size`."""


class Cotangents(NamedTuple):
    """Cotangents of the outputs: the loss is their inner product with the outputs.

    `unscaled` is for the leaves of the final state times exp(m - m_ref), so that the loss does not
    depend on the log-scale m; `state` is for the leaves as stored.
    """

    h: np.ndarray
    unscaled: Any
    state: Any
    m_ref: np.ndarray | None


class Result(NamedTuple):
    h: np.ndarray
    state: Any
    gradients: dict[str, np.ndarray]  # by argument name: inputs, weights, and "state.C" etc.


def program(subject: Subject, reverse: bool = False, **options):
    """A function of (inputs, weights, state, reset, mask) that calls the op."""
    options = {**subject.options, **options}
    if subject.op in IN_CHUNKS:
        options = {"chunk_size": L, **options}
    if reverse:
        options["reverse"] = True

    def call(inputs, weights, state, reset=None, mask=None):
        with subject.tracing_context():
            return _with_float_length(OPS[subject.op])(
                **inputs,
                **weights,
                state=state,
                reset=reset,
                mask=mask,
                implementation=subject.implementation,
                **options,
            )

    return call


def _with_float_length(op):
    """The op, with the integer leaf of a cache as a float, which has a gradient (zero)."""

    def call(*, state, **arguments):
        if hasattr(state, "length"):
            state = state._replace(length=state.length.astype(jnp.int32))
        h, last = op(**arguments, state=state)
        if hasattr(last, "length"):
            # A cache has the dtype of activations; its cotangents are those of a wide state.
            wide = state_dtype(h)
            last = jax.tree.map(lambda leaf: leaf.astype(wide), last)
        return h, last

    return call


def reference_program(subject: Subject, **options):
    """The same function, by the scan of the cell."""

    def call(inputs, weights, state, reset=None, mask=None):
        return _with_float_length(REFERENCES[subject.op])(
            **inputs,
            **weights,
            state=state,
            reset=reset,
            mask=mask,
            **{**subject.options, **options},
        )

    return call


def run(subject: Subject, case: Case, cotangents: Cotangents, dtype="float32", **options) -> Result:
    """Values and gradients of `case` in `dtype`, by the subject's implementation."""
    if dtype == "float64" and subject.widest_dtype != dtype:
        pytest.skip(f"{subject.implementation} supports {subject.widest_dtype} at most")
    compiled = _compiled(subject, tuple(sorted(options.items())))
    return _run(compiled, case, cotangents, dtype)


def run_reference(variant: str, case: Case, cotangents: Cotangents, **options) -> Result:
    """Values and gradients of `case` by the float64 recurrence.

    Shorter cases are padded with masked steps, so that all share one program.
    """
    padded = pad(case, max(case.length, *LENGTHS))
    loss = cotangents._replace(h=pad_time(cotangents.h, padded.length))
    result = run(Subject(variant, "reference"), padded, loss, "float64", **options)
    T = case.length
    gradients = {
        name: gradient[:, :T] if name in case.inputs else gradient
        for name, gradient in result.gradients.items()
    }
    return Result(result.h[:, :T], result.state, gradients)


def assert_equals_the_recurrence(
    subject: Subject,
    case: Case,
    tol: Tolerances,
    dtype: str = "float32",
    *,
    stored=False,
    **options,
):
    """Values, final state and gradients of one call agree with the float64 recurrence."""
    reference_options = {k: value for k, value in options.items() if k != "chunk_size"}
    cotangents = random_cotangents(subject.variant, case, stored=stored, **reference_options)
    actual = run(subject, case, cotangents, dtype, **options)
    expected = run_reference(subject.variant, case, cotangents, **reference_options)
    assert_results_close(actual, expected, tol)


def assert_results_close(actual: Result, expected: Result, tol: Tolerances):
    """h, the final state and all gradients agree."""
    tolerances.assert_close(actual.h, expected.h, tol.h, "h")
    tolerances.assert_states_close(actual.state, expected.state, tol.state)
    tolerances.assert_gradients_close(actual.gradients, expected.gradients, tol)


def random_cotangents(variant: str, case: Case, *, stored=False, seed=1, **options) -> Cotangents:
    """Random cotangents of h and the unscaled final state, or with `stored`, of its leaves."""
    rng = np.random.default_rng(seed)
    random = lambda x: rng.standard_normal(x.shape).astype(np.float32).astype(np.float64)  # noqa: E731
    probe = run_reference(variant, case, zero_cotangents(variant, case), **options)
    m_ref = _log_scale(probe.state)
    state = jax.tree.map(random, probe.state)
    zeros = jax.tree.map(np.zeros_like, state)
    return Cotangents(random(probe.h), *((zeros, state) if stored else (state, zeros)), m_ref)


def zero_cotangents(variant: str, case: Case) -> Cotangents:
    """Cotangents of zero; `m_ref` is that of the state before the first step."""
    zeros = jax.tree.map(np.zeros_like, case.state)
    return Cotangents(np.zeros(_shape_of_h(variant, case)), zeros, zeros, _log_scale(case.state))


def _shape_of_h(variant: str, case: Case) -> tuple[int, ...]:
    inputs, op = case.inputs, op_of(variant)
    if op in ("slstm", "lstm"):
        return inputs["x"][:, :, 0].shape
    if op == "attention":
        return (*inputs["q"].shape[:3], inputs["v"].shape[-1])
    return inputs["v" if "v" in inputs else "x"].shape


def _log_scale(state) -> np.ndarray | None:
    return getattr(state, "m", None)


@functools.cache
def _compiled(subject: Subject, options: tuple[tuple[str, Any], ...]):
    make = reference_program if subject.implementation == "reference" else program
    call = make(subject, **dict(options))
    return quick.jit(functools.partial(_evaluate, call))


def _evaluate(call, case: Case, cotangents: Cotangents):
    def outputs_of(inputs, weights, state):
        h, last = call(inputs, weights, state, case.reset, case.mask)
        return h, _unscaled(last, cotangents.m_ref), last

    outputs, pullback = jax.vjp(outputs_of, case.inputs, case.weights, case.state)
    return outputs[0], outputs[2], pullback((cotangents.h, cotangents.unscaled, cotangents.state))


def _unscaled(state, m_ref):
    """Leaves times exp(m - m_ref), with m replaced by zeros."""
    if m_ref is None:
        return state
    scale = jnp.exp(jnp.clip(state.m - m_ref, -80, 80))
    leaves = {
        name: leaf * scale.reshape(scale.shape + (1,) * (leaf.ndim - scale.ndim))
        for name, leaf in state._asdict().items()
        if name not in ("h", "m")
    }
    return state._replace(**leaves, m=jnp.zeros_like(state.m))


def _run(compiled, case, cotangents, dtype) -> Result:
    with jax.enable_x64(dtype == "float64"):
        args = _arrays(case, cotangents, dtype)
        h, state, (inputs, weights, initial) = jax.tree.map(
            lambda x: np.asarray(x, np.float64), compiled(*args)
        )
    gradients = {**inputs, **weights}
    gradients |= {f"state.{name}": leaf for name, leaf in initial._asdict().items()}
    return Result(h, state, gradients)


def _arrays(case: Case, cotangents: Cotangents, dtype: str) -> tuple[Case, Cotangents]:
    """Arguments on the device, in `dtype`, except for states, which are float32 or wider."""
    state_dtype = "float32" if dtype == "bfloat16" else dtype
    args = jax.tree.map(lambda x: _as(x, state_dtype), (case, cotangents))
    if dtype == state_dtype:
        return args
    case, cotangents = args
    inputs, weights, h = jax.tree.map(
        lambda x: x.astype(dtype), (case.inputs, case.weights, cotangents.h)
    )
    return case._replace(inputs=inputs, weights=weights), cotangents._replace(h=h)


def _as(x: np.ndarray, dtype: str) -> jax.Array:
    return jnp.asarray(x, bool if x.dtype == bool else dtype)
