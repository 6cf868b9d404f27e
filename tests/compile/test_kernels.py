"""Every TPU kernel, forward and gradient, compiles for one chip and for a mesh of four."""

import re

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.aot import compiler
from tests.compile import calls

CALLS = {
    "mlstm": calls.mlstm(512, 256, 512),
    "mlstm, resets and masks": calls.mlstm(512, 256, 512, flags=True),
    "mlstm, odd sizes, float32": calls.mlstm(300, 64, 96, jnp.float32),
    "mlstm, sigmoid, no normalizer": calls.mlstm(
        256, 128, 256, input_gate="sigmoid", normalize=False
    ),
    "slstm": calls.slstm(256, 256),
    "slstm, resets and masks": calls.slstm(100, 64, flags=True),
    "slstm, float32": calls.slstm(64, 128, jnp.float32),
}
STEPS = {
    "mlstm": calls.mlstm(1, 256, 512),
    "mlstm, odd widths": calls.mlstm(1, 64, 96, jnp.float32),
    "mlstm, resets and masks": calls.mlstm(1, 256, 512, flags=True),
    "slstm": calls.slstm(1, 256),
    "slstm, resets and masks": calls.slstm(1, 64, jnp.float32, flags=True),
}


@pytest.mark.parametrize("name", ["mlstm", "slstm"])
def test_forward_pass_compiles(chip, name):
    call, args = CALLS[name]
    compiled = compiler.compile_for(chip, call, *args)
    assert compiler.kernels(compiled) == {f"{name[:5]}_forward"}


@pytest.mark.parametrize("name", [name for name in CALLS if name not in ("mlstm", "slstm")])
def test_gradient_compiles_with_every_option(name):
    _assert_gradient_compiles("v5e", name)


@pytest.mark.parametrize("name", ["mlstm", "slstm"])
def test_gradient_compiles(chip, name):
    _assert_gradient_compiles(chip, name)


def _assert_gradient_compiles(chip, name):
    call, args = CALLS[name]
    compiled = compiler.compile_for(chip, calls.gradient(call), *args)
    assert compiler.kernels(compiled) == {f"{name[:5]}_forward", f"{name[:5]}_backward"}


@pytest.mark.parametrize("name", ["mlstm", "slstm"])
def test_decoding_step_reuses_a_donated_state(chip, name):
    _assert_state_is_reused(chip, name)


@pytest.mark.parametrize("name", [name for name in STEPS if name not in ("mlstm", "slstm")])
def test_decoding_step_reuses_a_donated_state_with_every_option(name):
    _assert_state_is_reused("v5e", name)


def _assert_state_is_reused(chip, name):
    call, args = STEPS[name]
    state = 5 if name.startswith("mlstm") else 3
    compiled = compiler.compile_for(chip, call, *args, donate=state)
    assert compiler.kernels(compiled) == {f"{name[:5]}_decode"}
    largest = max(args[state], key=lambda leaf: leaf.size)
    assert compiled.memory_analysis().alias_size_in_bytes >= largest.size * 4
    sizes = ",".join(map(str, largest.shape))
    assert not re.search(rf"= f32\[{sizes}\]\S* copy\(", compiled.as_text())


@pytest.mark.parametrize("K,V", [(1280, 1280), (1000, 1000), (512, 1024)])
def test_decoding_step_compiles_for_wide_heads(K, V):
    call, args = calls.mlstm(1, K, V)
    assert compiler.kernels(compiler.compile_for("v5e", call, *args)) == {"mlstm_decode"}


@pytest.mark.parametrize("name", ["mlstm", "slstm"])
def test_kernels_on_a_mesh_need_no_collectives(name):
    """Except for the gradient of the recurrent weights, which is summed over the batch."""
    mesh = compiler.make_mesh(compiler.devices("v5p", 4), tensor=2)
    call, args = CALLS[name]
    kwargs = dict(mesh=mesh, shardings=calls.shardings(mesh, name, args))
    forward = compiler.compile_for("v5p", call, *args, **kwargs).as_text()
    assert not re.findall(calls.COLLECTIVES, forward)
    backward = compiler.compile_for("v5p", calls.pullback(call), *args, **kwargs).as_text()
    collectives = set(re.findall(calls.COLLECTIVES, backward))
    assert collectives <= ({"all-reduce"} if name == "slstm" else set())


@pytest.mark.parametrize("name", ["mlstm", "slstm"])
def test_vmap_of_the_gradient_compiles(name):
    call, args = CALLS[name]
    mapped = jax.tree.map(lambda x: calls.shape(2, *x.shape, dtype=x.dtype), args)
    compiled = compiler.compile_for("v5e", jax.vmap(calls.gradient(call)), *mapped)
    assert compiler.kernels(compiled) == {f"{name}_forward", f"{name}_backward"}


@pytest.mark.parametrize("T,K,flags", [(1000, 64, False), (1024, 128, True)])
def test_splash_attention_compiles_by_default(T, K, flags):
    """Forward and backward pass, for a length that is not a multiple of the blocks."""
    call, args = calls.attention(T, K, flags=flags, window=256)
    compiled = compiler.compile_for("v5e", calls.gradient(call), *args)
    segmented = "segmented_" * flags
    names = ("fwd_{}residuals", "dq_{}no_residuals", "dkv_{}no_residuals")
    expected = {"splash_mha_" + name.format(segmented) for name in names}
    assert set(re.findall(r"splash_mha_\w+", str(compiled.as_text()))) == expected
