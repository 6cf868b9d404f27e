"""Programs of these tests run a few times: compiling them fast matters, not how fast they are."""

import jax
import pytest


@pytest.fixture(scope="module", autouse=True)
def quick_compiler():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
