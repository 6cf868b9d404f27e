"""Process settings of `xlstm_jax.cpu`; each test runs a new process."""

import os
import platform
import subprocess
import sys

import pytest

SETTINGS = """
from xlstm_jax import cpu
retains_memory = cpu.prepare()
import jax
print(retains_memory, jax.config.values["jax_cpu_enable_async_dispatch"])
"""
PAGE_FAULTS = """
import resource, jax.numpy as jnp
def large_temporaries(x):
    for _ in range(4):
        x = jnp.sort(jnp.sin(jax.lax.optimization_barrier(x)), axis=0)
    return x.sum()
f = jax.jit(large_temporaries)
x = jnp.ones((1000, 1000))
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    f(x).block_until_ready()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(min(faults() for _ in range(4)))
"""


def run_program(program, **env):
    process = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.split()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc retains memory")
def test_temporary_buffers_are_reused_without_page_faults():
    retains_memory, async_dispatch, faults = run_program(SETTINGS + PAGE_FAULTS)
    assert (retains_memory, async_dispatch) == ("True", "False")
    assert int(faults) < 100  # an array of this size has 1,000 small pages


def test_environment_variable_for_async_dispatch_takes_precedence():
    _, async_dispatch = run_program(SETTINGS, JAX_CPU_ENABLE_ASYNC_DISPATCH="true")
    assert async_dispatch == "True"
