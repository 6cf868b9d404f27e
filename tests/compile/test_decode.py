"""The decode step of the 7B model: each weight is read once, and none is copied or cast."""

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.aot import compiler
from xlstm_jax.generate import prepare_params
from xlstm_jax.modules import LM, presets
from xlstm_jax.modules.stack import unstack_layers
from xlstm_jax.plan.hlo import Program
from xlstm_jax.plan.traffic import memory_traffic, traffic_by_instruction


def compiled_step(target, dtype, donate=None):
    """The program, and the bytes that it must move: weights once, the state in and out."""
    model = LM(presets.get("xlstm_7b"))
    cfg = model.cfg
    first = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    variables = jax.eval_shape(model.init, jax.random.key(0), first)
    prepared = jax.eval_shape(lambda v: prepare_params(model, v, dtype=dtype), variables)
    state = jax.eval_shape(lambda: unstack_layers(cfg.pattern, model.init_state(1)))

    def step(variables, token, state):
        logits, state = model.apply(variables, token, state=state)
        return jnp.argmax(logits[:, -1:], axis=-1), state

    program = compiler.compile_for(target, step, prepared, first, state, donate=donate)
    weights = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(prepared))
    table = prepared["params"]["token_embedding"]["embedding"]  # one embedding is read
    weights -= table.size * table.dtype.itemsize
    states = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    return Program(str(program.as_text())), weights + 2 * states


@pytest.mark.parametrize("target", ["sm_90", "v6e"])
def test_bytes_of_a_token_are_those_of_weights_and_state(target):
    program, minimum = compiled_step(target, None, donate=2)
    assert memory_traffic(program) == pytest.approx(minimum, rel=0.05)
    largest = 4096 * 2048 * 2  # bytes of the smallest of the large matrices
    moved = [
        (x.opcode, x.shapes)
        for x, _, size in traffic_by_instruction(program)
        if x.opcode in ("copy", "convert", "concatenate", "transpose") and size >= 2 * largest
    ]
    assert not moved


@pytest.mark.parametrize("target", ["sm_90", "v6e"])
def test_8_bit_weights_halve_the_bytes_of_a_token(target):
    half = memory_traffic(compiled_step(target, None)[0]) / 2
    assert memory_traffic(compiled_step(target, "int8")[0]) == pytest.approx(half, rel=0.05)
