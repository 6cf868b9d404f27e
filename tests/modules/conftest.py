"""Fixtures of the tests in this folder."""

import jax
import jaxtyping
import pytest


@pytest.fixture
def unchecked_types():
    """Turns off the type checks that only tests have, to reach the checks of the library."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def quick_compilation():
    """Skips most compiler optimizations: compilation dominates the run time of small models."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
