"""The functions under test: every one that computes, with the arguments of a call.

`docs/transformations.md` lists them in this order; `test_table.py` compares both.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import common
from tests import quick
from tests.modules.models import config
from tests.ops.subjects import KERNELS, implementations
from xlstm_jax import cells, ops
from xlstm_jax.modules import LM, LargeMLSTMLayer, MLSTMLayer, SLSTMLayer
from xlstm_jax.ops import activations

B, T, H, K, V = 2, 6, 2, 2, 3
F, W, VOCAB, D = H * K, 3, 5, 16  # D: width of layers and models
CHUNK = 4  # does not divide T

Arguments = dict[str, Any]


class Case(NamedTuple):
    """One function, or one implementation of an op, called as `call(**arguments)`.

    Floats among the arguments are float64, flags are booleans with True and False in them.
    """

    name: str
    call: Callable[..., Any]
    make: Callable[[np.random.Generator], Arguments]
    batched: tuple[str, ...]  # arguments whose arrays start with the axis B, or "layers B"
    timed: tuple[str, ...] = ()  # arguments `B T ...`; a step has none
    implementation: str = ""
    is_step: bool = False  # returns the state first
    kwargs: Arguments = {}

    @property
    def is_kernel(self) -> bool:
        return self.implementation in KERNELS

    @property
    def has_state(self) -> bool:
        return "state" in self.batched

    @property
    def has_flags(self) -> bool:
        return "mask" in self.batched

    @property
    def dtype(self) -> str:
        """The widest dtype that it supports."""
        return "float32" if self.is_kernel else "float64"

    def arguments(self, seed: int = 0, dtype: str | None = None) -> Arguments:
        """Random arguments; floats in `dtype`, the widest one if None."""
        return as_dtype(_arguments(self.name, seed), dtype or self.dtype)

    def run(self, arguments: Arguments) -> tuple[Any, Any]:
        """Output and state (None without one)."""
        with common.interpreted(lanes=8) if self.is_kernel else common.interpreted(False):
            result = self.call(**arguments, **self.kwargs)
        if not self.has_state:
            return result, None
        return (result[1], result[0]) if self.is_step else result


def as_dtype(tree: Any, dtype: str) -> Any:
    """Floats in `dtype`, other arrays as they are, all as JAX arrays."""
    return jax.tree.map(
        lambda x: jnp.asarray(x, dtype if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype), tree
    )


@functools.cache
def _arguments(name: str, seed: int) -> Arguments:
    return BY_NAME[name].make(np.random.default_rng([seed, 0]))


def _flags(rng) -> Arguments:
    """Sequence 0 has a masked reset; no sequence is fully masked."""
    mask, reset = rng.random((B, T)) < 0.7, rng.random((B, T)) < 0.3
    mask[0, 2], reset[0, 2], mask[1, 2:4], reset[1, 3] = False, True, True, True
    return {"reset": reset, "mask": mask}


def _mlstm(rng) -> Arguments:
    n = rng.standard_normal
    inputs = {"q": n((B, T, H, K)), "k": n((B, T, H, K)), "v": n((B, T, H, V))}
    inputs |= {"i": n((B, T, H)), "f": n((B, T, H)) + 1}
    state = cells.MLSTMState(n((B, H, K, V)), n((B, H, K)), n((B, H)))
    return {**inputs, "state": state, **_flags(rng)}


def _gated(rng, state_type) -> Arguments:
    n = rng.standard_normal
    x, r, b = n((B, T, 4, H, K)), 0.4 * n((H, K, 4, K)), 0.5 * n((H, 4, K))
    state = state_type._make(0.5 * n((B, H, K)) for _ in state_type._fields)
    if "n" in state_type._fields:
        state = state._replace(n=1 + np.abs(state.n))
    return {"x": x, "r": r, "b": b, "state": state, **_flags(rng)}


def _step(make):
    """The arguments of the first time step of `make`."""

    def arguments(rng):
        made = make(rng)
        timed = ("q", "k", "v", "i", "f", "x")
        return {
            name: x[:, 0] if name in timed else x
            for name, x in made.items()
            if name not in ("reset", "mask")
        }

    return arguments


def _conv(rng, *, mixing: bool) -> Arguments:
    n = rng.standard_normal
    kernel = n((W, F, V)) if mixing else n((W, F))
    state, bias = n((B, W - 1, F)), n(kernel.shape[-1])
    return {"x": n((B, T, F)), "kernel": kernel, "bias": bias, "state": state, **_flags(rng)}


def _cross_entropy(rng) -> Arguments:
    targets = rng.integers(0, VOCAB, (B, T), dtype=np.int32)
    n = rng.standard_normal
    return {
        "x": n((B, T, F)),
        "kernel": n((F, VOCAB)),
        "targets": targets,
        "weights": rng.random((B, T)),
    }


def _norm(rng, *, heads: bool = False) -> Arguments:
    n = rng.standard_normal
    x = {"h": n((B, T, H, K))} if heads else {"x": n((B, T, F))}
    return {**x, "scale": 1 + n(F), "bias": n(F)}


def _embed(rng) -> Arguments:
    n, tokens = rng.standard_normal, rng.integers(0, VOCAB, (B, T), dtype=np.int32)
    return {"tokens": tokens, "table": n((VOCAB, F))}


LAYERS = {"MLSTMLayer": MLSTMLayer, "SLSTMLayer": SLSTMLayer, "LargeMLSTMLayer": LargeMLSTMLayer}


@functools.cache
def layer(name: str) -> Any:
    cfg = config()
    options = {"MLSTMLayer": cfg.mlstm, "SLSTMLayer": cfg.slstm, "LargeMLSTMLayer": cfg.large}
    return LAYERS[name](options[name])


def _layer(rng, name: str) -> Arguments:
    x = rng.standard_normal((B, T, D))
    shapes = jax.eval_shape(layer(name).init, jax.random.key(0), jnp.float32(x))["params"]
    state = jax.eval_shape(lambda: layer(name).init_state(B, D))
    return {"params": _random(rng, shapes), "x": x, "state": _state(rng, state), **_flags(rng)}


def _random(rng, shapes) -> Any:
    return jax.tree.map(lambda leaf: 0.3 * rng.standard_normal(leaf.shape), shapes)


def _state(rng, shapes) -> Any:
    """A random state; normalizers are at least 1, as those of the sLSTM are."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf + (1.0 if getattr(path[-1], "name", "") == "n" else 0.0),
        jax.tree.map(lambda leaf: 0.3 * np.abs(rng.standard_normal(leaf.shape)), shapes),
    )


@functools.cache
def model(letter: str) -> LM:
    return LM(config(letter))


def _lm(rng, letter: str) -> Arguments:
    lm, tokens = model(letter), rng.integers(0, 11, (B, T), dtype=np.int32)
    variables = _random(rng, jax.eval_shape(lm.init, jax.random.key(0), tokens))
    state = _state(rng, jax.eval_shape(lambda: lm.init_state(B)))
    segment_ids = np.sort(rng.integers(0, 3, (B, T), dtype=np.int32))[:, ::-1].copy()
    # Tests split sequences in the middle and would lose the reset of a document that starts in it.
    segment_ids[:, T // 2] = segment_ids[:, T // 2 - 1]
    flags = {"segment_ids": segment_ids, "mask": _flags(rng)["mask"]}
    return {"variables": variables, "tokens": tokens, "state": state, **flags}


def _cases():
    flags, gated = ("reset", "mask"), functools.partial
    mlstm, x = ("q", "k", "v", "i", "f"), ("x",)
    recurrent = (("slstm", cells.SLSTMState), ("lstm", cells.LSTMState))
    for name in ("recurrent", "chunkwise", "parallel", *KERNELS):
        kwargs = {"implementation": name, "chunk_size": 8 if name in KERNELS else CHUNK}
        batched, timed = (*mlstm, "state", *flags), (*mlstm, *flags)
        yield Case(f"mlstm-{name}", ops.mlstm, _mlstm, batched, timed, name, kwargs=kwargs)
    batched, timed = (*x, "state", *flags), (*x, *flags)
    for op, state in recurrent:
        for name in ("recurrent", *KERNELS) if op == "slstm" else ("recurrent",):
            make, kwargs = gated(_gated, state_type=state), {"implementation": name}
            yield Case(f"{op}-{name}", getattr(ops, op), make, batched, timed, name, kwargs=kwargs)
        scan, step = getattr(cells, f"{op}_scan"), getattr(cells, f"{op}_step")
        yield Case(f"{op}_scan", scan, make, batched, timed)
        yield Case(f"{op}_step", step, _step(make), ("x", "state"), is_step=True)
    yield Case("mlstm_scan", cells.mlstm_scan, _mlstm, (*mlstm, "state", *flags), (*mlstm, *flags))
    yield Case("mlstm_step", cells.mlstm_step, _step(_mlstm), (*mlstm, "state"), is_step=True)
    for name in ("depthwise", "mixing"):
        make = gated(_conv, mixing=name == "mixing")
        yield Case(f"causal_conv-{name}", ops.causal_conv, make, batched, timed)
    sequences = ("x", "targets", "weights")
    kwargs = {"z_loss": 0.1, "soft_cap": 3.0, "chunk_size": CHUNK}
    yield Case("cross_entropy", ops.cross_entropy, _cross_entropy, sequences, kwargs=kwargs)
    yield Case("layer_norm", ops.layer_norm, _norm, x)
    yield Case("rms_norm", ops.rms_norm, _norm, x)
    yield Case("multi_head_norm", ops.multi_head_norm, gated(_norm, heads=True), ("h",))
    yield Case("soft_cap", ops.soft_cap, _activation, x, kwargs={"cap": 2.0})
    yield Case("silu", activations.silu, _activation, x)
    for gate in (activations.silu_gate, activations.sigmoid_gate):
        yield Case(gate.__name__, gate, gated(_activation, gate=True), ("gate", "x"))
    for op, kernels in (("dense", {"": (F, V)}), ("grouped_dense", GROUPS)):
        for suffix, shape in kernels.items():
            make = gated(_product, shape=shape)
            yield Case(op + suffix, getattr(ops, op), make, x)
    yield Case("embed", ops.embed, _embed, ("tokens",))
    make = lambda rng: {"segment_ids": rng.integers(0, 3, (B, T), dtype=np.int32)}  # noqa: E731
    yield Case("document_starts", ops.document_starts, make, ("segment_ids",))
    for name in LAYERS:
        call = gated(_apply_layer, name)
        yield Case(name, call, gated(_layer, name=name), batched, timed)
    for letter in "msM":
        names = ("tokens", "segment_ids", "mask")
        call, make = gated(_apply_model, letter), gated(_lm, letter=letter)
        yield Case(f"LM-{letter}", call, make, (*names, "state"), names)


GROUPS = {"": (2, 2, 2), "-tiles": (2, 12, 12)}
"""Kernels of small groups, which a CPU multiplies elementwise, and of wide ones."""


def _activation(rng, *, gate: bool = False) -> Arguments:
    names = ("gate", "x") if gate else ("x",)
    return {name: rng.standard_normal((B, T, F)) for name in names}


def _product(rng, shape: tuple[int, ...]) -> Arguments:
    in_dim = shape[0] if len(shape) == 2 else shape[0] * shape[1]
    return {"x": rng.standard_normal((B, T, in_dim)), "kernel": rng.standard_normal(shape)}


def _apply_layer(name: str, *, params, x, state, reset, mask):
    return layer(name).apply({"params": params}, x, state, reset=reset, mask=mask)


def _apply_model(letter: str, *, variables, tokens, state, segment_ids, mask):
    return model(letter).apply(variables, tokens, state, segment_ids=segment_ids, mask=mask)


CASES = tuple(_cases())
BY_NAME = {case.name: case for case in CASES}

HEAVY = ("_scan", "Layer", "LM-", "-parallel", "-pallas_tpu", "-triton", "rms_norm", "-tiles")
"""Parts of the names of cases whose programs take long to compile, or repeat another case."""


def each_case(
    where: Callable[[Case], bool] = lambda case: True,
    *,
    slow: tuple[str, ...] = HEAVY,
    exhaustive: tuple[str, ...] = (),
):
    """Parametrize a test over the cases that satisfy `where`, by name.

    Those with a name that contains a part in `slow` or `exhaustive` are marked as such.
    """
    parameters = []
    for case in filter(where, CASES):
        marks = [pytest.mark.slow] if any(part in case.name for part in slow) else []
        if any(part in case.name for part in exhaustive):
            marks = [pytest.mark.exhaustive]
        if case.is_kernel and (
            why := implementations(case.name.split("-")[0])[case.implementation]
        ):
            marks.append(pytest.mark.skip(reason=why))
        parameters.append(pytest.param(case.name, id=case.name, marks=marks))
    return pytest.mark.parametrize("case", parameters, indirect=True)


def is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def split_floats(case: Case, arguments: Arguments) -> tuple[Arguments, Arguments]:
    """The differentiable arguments, and the others."""
    floats = {k: v for k, v in arguments.items() if all(map(is_float, jax.tree.leaves(v)))}
    return floats, {k: v for k, v in arguments.items() if k not in floats}


def is_differentiable(case: Case) -> bool:
    return case.name != "document_starts"


def loss(case: Case, floats: Arguments, rest: Arguments) -> jax.Array:
    """A scalar that depends on every output and on every leaf of the state."""
    leaves = jax.tree.leaves(case.run({**floats, **rest}))
    # Cast explicitly: tests also call this without implicit promotion of dtypes.
    dtype = max((x.dtype for x in jax.tree.leaves(floats)), key=lambda dtype: dtype.itemsize)
    return sum(jnp.sum(jnp.sin(leaf)).astype(dtype) for leaf in leaves)


@functools.cache
def value(name: str):
    """`loss` of a case, compiled."""
    return quick.jit(functools.partial(loss, BY_NAME[name]))


@functools.cache
def gradient(name: str):
    """The gradient of `loss`, compiled."""
    return quick.jit(jax.grad(functools.partial(loss, BY_NAME[name])))


@functools.cache
def outputs(name: str):
    """`Case.run` of a case, compiled."""
    return quick.jit(BY_NAME[name].run)


def assert_close(actual: Any, expected: Any, tolerance: float) -> None:
    """All leaves agree, relative to the largest element of all of them."""
    pairs = list(zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True))
    scale = max([1e-3] + [float(np.abs(b).max()) for _, b in pairs if np.size(b)])
    for a, b in pairs:
        assert a.shape == b.shape
        np.testing.assert_allclose(
            np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=0, atol=tolerance * scale
        )
