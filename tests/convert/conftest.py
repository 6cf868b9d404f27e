"""Fixtures of the tests beside this file."""

import jax
import jaxtyping
import pytest


@pytest.fixture(autouse=True)
def quickly_compiled():
    """Small models spend their time in the compiler: it may leave its later passes out."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def unchecked_types():
    """As outside of tests: signatures are not checked, so the code's own checks are met."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
