"""Compiles without most optimizations: programs of these tests run only a few times."""

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def disabled_optimizations():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
