"""Fixtures of the tests in this folder."""

import os

import jax
import pytest


@pytest.fixture(autouse=True)
def quick_compilation():
    """Skips most compiler optimizations: compilation dominates the run time of small models.

    Not when errors are measured: the published ones are those of fully optimized programs.
    """
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", "XLSTM_GOLDEN_ERRORS" not in os.environ)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
