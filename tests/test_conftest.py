"""The settings of all tests are in force."""

import os
import pathlib
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import jaxtyping
import pytest

from xlstm_jax import cells


def test_tests_have_eight_cpu_devices():
    assert [device.platform for device in jax.devices()] == ["cpu"] * 8


def test_rank_promotion_raises():
    with pytest.raises(ValueError, match="rank_promotion"):
        jnp.ones((2, 3)) + jnp.ones(3)


def test_warnings_are_errors():
    with pytest.raises(UserWarning, match="careful"):
        warnings.warn("careful", stacklevel=1)


def test_shapes_that_violate_a_signature_raise():
    state = cells.slstm_init(2, 3, 4)
    with pytest.raises(jaxtyping.TypeCheckError, match="slstm_step"):
        cells.slstm_step(state, jnp.zeros((2, 4, 3, 4)), jnp.zeros((3, 5, 4, 4)))


def test_float64_is_off_without_the_fixture():
    assert jnp.zeros(1).dtype == jnp.float32


def test_float64_is_on_with_the_fixture(x64):
    assert jnp.zeros(1).dtype == jnp.float64


def test_missing_device_is_refused():
    command = [sys.executable, "-m", "pytest", "tests/ops/test_choice.py", "--device", "tpu"]
    environ = os.environ | {"JAX_PLATFORMS": "cpu"}
    root = pathlib.Path(__file__).parents[1]
    process = subprocess.run(command, capture_output=True, text=True, env=environ, cwd=root)
    assert process.returncode == 4
    assert "--device tpu: JAX's default backend is 'cpu'" in process.stderr
