"""Fixtures of the tests beside this file."""

import os

import jax
import jaxtyping
import pytest


@pytest.fixture(autouse=True)
def quickly_compiled():
    """Small models spend their time in the compiler: it may leave its later passes out.

    Not where the errors are measured: published ones are those of programs as users run them.
    """
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", "XLSTM_GOLDEN_ERRORS" not in os.environ)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def unchecked_types():
    """As outside of tests: signatures are not checked, so the code's own checks are met."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
