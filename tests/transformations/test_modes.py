"""Modes of JAX: without jit, with NaN checks, in float64, without implicit promotion; any flags."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import quick
from tests.modules.models import config
from tests.transformations.cases import (
    Case,
    as_dtype,
    assert_close,
    each_case,
    is_differentiable,
    is_float,
    loss,
    outputs,
    split_floats,
)
from xlstm_jax.data.batch import Batch
from xlstm_jax.modules import LM
from xlstm_jax.train.config import TrainConfig
from xlstm_jax.train.losses import language_model_loss

MODULES = ("Layer", "LM-")


REPEATED = ("_scan", "Layer", "-tiles", "rms_norm", "LM-s", "LM-M")
"""Cases whose code other cases run too."""


def is_module(case: Case) -> bool:
    return any(part in case.name for part in MODULES)


def results(case: Case, arguments):
    """Outputs, and gradients of the differentiable arguments."""
    floats, rest = split_floats(case, arguments)
    if not floats:
        return case.run(arguments), None
    return case.run(arguments), jax.grad(functools.partial(loss, case))(floats, rest)


def float_dtypes(tree) -> set[str]:
    return {str(leaf.dtype) for leaf in jax.tree.leaves(tree) if is_float(leaf)}


EAGER = ("lstm", "causal_conv", "cross_entropy", "grouped", *MODULES, "rms_norm")
"""Cases that take seconds without jit: every operation is compiled on its own."""


@each_case(slow=EAGER, exhaustive=("Layer", "_scan", "slstm-pallas_tpu"))
def test_function_without_jit_equals_the_compiled_one(case):
    """No intermediate value is NaN either, forward or backward."""
    arguments = case.arguments()
    with jax.disable_jit(), jax.debug_nans(True):
        actual = results(case, arguments)
    expected = quick.jit(functools.partial(results, case))(arguments)
    assert_close(actual, expected, 1e-4 if case.is_kernel else 1e-10)


def extreme(case: Case):
    """Arguments with closed gates, an initial state, and NaN at masked positions."""
    arguments = {name: np.array(x) if name != "state" else x for name, x in _arrays(case).items()}
    gates = {"i": arguments.get("i"), "f": arguments.get("f")}
    if "r" in arguments:
        i, f, _, o = np.moveaxis(arguments["x"], -3, 0)
        gates = {"i": i, "f": f, "o": o}
    for position, gate in enumerate(gate for gate in gates.values() if gate is not None):
        # Sequence 0, or its first and a later position.
        gate[0, [0, 3 + position] if not case.is_step else 0] = -np.inf
    for name in case.timed:
        if case.has_flags and is_float(arguments[name]):
            arguments[name][~arguments["mask"]] = np.nan
    arguments["state"] = jax.tree.map(jnp.zeros_like, arguments["state"])
    return jax.tree.map(jnp.asarray, arguments)


def _arrays(case: Case):
    return {name: x if name == "state" else np.asarray(x) for name, x in case.arguments().items()}


@each_case(lambda case: case.has_state and not is_module(case))
def test_closed_gates_and_masked_nan_give_no_nan(case):
    arguments = extreme(case)
    with jax.debug_nans(True):
        outputs_and_gradients = quick.jit(functools.partial(results, case))(arguments)
    for leaf in jax.tree.leaves(outputs_and_gradients):
        assert np.isfinite(leaf).all()


@each_case(lambda case: is_differentiable(case) and (is_module(case) or not case.has_state))
def test_results_and_gradients_pass_the_nan_check(case):
    with jax.debug_nans(True):
        quick.jit(functools.partial(results, case))(case.arguments())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@each_case(lambda case: is_differentiable(case) and not case.is_kernel, slow=REPEATED)
def test_results_and_gradients_have_the_dtype_of_the_arguments(case, dtype):
    """With float64 enabled, float32 stays float32; without implicit promotion too."""
    with jax.numpy_dtype_promotion("strict"):
        shapes = jax.eval_shape(functools.partial(results, case), case.arguments(dtype=dtype))
    assert float_dtypes(shapes) == {dtype}


@each_case(slow=REPEATED)
def test_no_dtype_is_promoted_implicitly(case):
    """bfloat16 with a float32 state, and for kernels float32; values and gradients."""
    with jax.numpy_dtype_promotion("strict"):
        for dtype in ("bfloat16", "float32") if case.is_kernel else ("bfloat16",):
            arguments = case.arguments(dtype=dtype)
            if case.has_state:
                arguments["state"] = as_dtype(arguments["state"], "float32")
            shapes = jax.eval_shape(functools.partial(results, case), arguments)
            assert float_dtypes(shapes) <= {dtype, "float32"}


@pytest.mark.parametrize("letter", [pytest.param(x, marks=pytest.mark.slow) for x in "ms"] + ["M"])
def test_loss_of_a_bfloat16_model_promotes_no_dtype_implicitly(letter):
    """float32 parameters, gradients and sums, bfloat16 activations."""
    model, cfg = LM(config(letter, dtype="bfloat16")), TrainConfig(steps=1)
    ids = jnp.ones((2, 6), jnp.int32)
    batch = Batch(ids, ids, ids, jnp.ones((2, 6)), jnp.zeros(2, jnp.int32))
    params = jax.eval_shape(model.init, jax.random.key(0), ids)["params"]
    loss_of = functools.partial(language_model_loss, model)
    with jax.numpy_dtype_promotion("strict"):
        grads, _ = jax.eval_shape(lambda p: jax.grad(loss_of, has_aux=True)(p, batch, cfg), params)
    assert grads == params


FLAGS = {
    "int32": lambda flag: flag.astype(np.int32),
    "uint8": lambda flag: flag.astype(np.uint8),
    "document numbers": lambda flag: flag * (1 + np.arange(flag.shape[1], dtype=np.int32)[None]),
    "negative": lambda flag: -flag.astype(np.int32),
    "float32": lambda flag: 0.5 * flag.astype(np.float32),
    "bfloat16": lambda flag: np.asarray(jnp.asarray(flag, jnp.bfloat16)),
}


@each_case(lambda case: case.has_flags)
def test_flags_of_any_dtype_equal_booleans(case):
    """Resets and masks as integers and floats, of JAX and of NumPy."""
    arguments = case.arguments()
    names = [name for name in ("reset", "mask") if name in arguments]
    flags = {name: np.asarray(arguments.pop(name)) for name in names}
    expected = outputs(case.name)({**arguments, **flags})
    variants = [{name: convert(x) for name, x in flags.items()} for convert in FLAGS.values()]

    def run(arguments, variants):
        return [case.run({**arguments, **flags}) for flags in variants]

    def run_numpy(arguments):  # constants of the program
        return run(arguments, [*variants, flags])

    as_jax = jax.tree.map(jnp.asarray, variants)
    for actual in (*quick.jit(run)(arguments, as_jax), *quick.jit(run_numpy)(arguments)):
        assert_close(actual, expected, 1e-6 if case.is_kernel else 1e-12)
