"""What a process asks for before it computes on a CPU; each in a process of its own."""

import os
import platform
import subprocess
import sys

import pytest

SETTING = """
from xlstm_jax import cpu
kept = cpu.prepare()
import jax
print(kept, jax.config.values["jax_cpu_enable_async_dispatch"])
"""
FAULTS = """
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


def report(program, **env):
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only the GNU C library keeps memory")
def test_memory_of_a_program_stays_in_the_process():
    kept, asynchronous, faults = report(SETTING + FAULTS)
    assert (kept, asynchronous) == ("True", "False")
    assert int(faults) < 100  # an array of this size has 1,000 small pages


def test_what_the_environment_says_about_dispatch_is_left_alone():
    _, asynchronous = report(SETTING, JAX_CPU_ENABLE_ASYNC_DISPATCH="true")
    assert asynchronous == "True"
