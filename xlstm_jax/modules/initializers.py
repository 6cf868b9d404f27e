"""Random keys, and parameter initializers: functions (key, shape) -> float32 array.

Sources: `small` Nguyen & Salazar 2019, arXiv:1910.05895; `wang` Wang & Komatsuzaki 2021 (GPT-J);
where each is used: arXiv:2405.04517, appendix, and arXiv:2503.13427, section 3.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from xlstm_jax.typing import Array, Float, PRNGKeyArray

# The dtype is explicit: parameters stay float32 under jax_enable_x64.
Initializer = Callable[[PRNGKeyArray, tuple[int, ...]], Float[Array, "..."]]


def random_key(seed: int) -> PRNGKeyArray:
    """A key in which every bit of a seed counts, for any integer.

    `jax.random.key` uses the lowest 32 bits only; of seeds from 0 to 2**32 - 1 it gives the same
    key. Higher words are folded in, and a last 0 if the seed is negative.
    """
    magnitude = abs(seed)
    key = jax.random.key(magnitude % 2**32)
    while magnitude := magnitude >> 32:
        key = jax.random.fold_in(key, magnitude % 2**32)
    # The highest word of a positive seed is not 0, so that both signs differ.
    return key if seed >= 0 else jax.random.fold_in(key, 0)


def jit_once(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`jax.jit` of a program that runs once, as initialization does.

    On a CPU, LLVM optimizes it at level 1: random numbers then compile in half of the time.
    Values may differ from those of `jax.jit` in the last bit.
    """
    plain = jax.jit(function, **options)
    quick = jax.jit(function, **options, compiler_options={"xla_backend_optimization_level": 1})

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        # Within a transformation `jax.jit` takes no compiler options. A new array is traced in a
        # program that has no argument in common with this call.
        arrays = (*jax.tree.leaves(args), jnp.zeros(()))
        is_traced = any(isinstance(array, Tracer) for array in arrays)
        is_debugged = jax.config.values["jax_disable_most_optimizations"]
        is_quick = jax.default_backend() == "cpu" and not (is_traced or is_debugged)
        return (quick if is_quick else plain)(*args)

    return call


def normal(std: float, mean: float = 0.0) -> Initializer:
    """Normal with the given mean and standard deviation."""
    if not std:
        return constant(mean)
    return lambda key, shape: mean + std * jax.random.normal(key, shape, jnp.float32)


def uniform(bound: float) -> Initializer:
    """Uniform between -bound and bound."""
    return lambda key, shape: jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def constant(value: float) -> Initializer:
    """All elements equal to `value`."""
    return lambda key, shape: jnp.full(shape, value, jnp.float32)


zeros = constant(0.0)
ones = constant(1.0)


def small(dim: int) -> Initializer:
    """Normal with variance 2 / (5 dim), for projections that read a stream of width dim."""
    return normal(math.sqrt(2 / (5 * dim)))


def wang(dim: int, num_blocks: int) -> Initializer:
    """Normal with std 2 / (num_blocks * sqrt(dim)), for projections onto the residual stream."""
    return normal(2 / (num_blocks * math.sqrt(dim)))


def linspace(first: float, last: float) -> Initializer:
    """Evenly spaced from first to last along the last axis; an axis of size 1 gets `first`."""

    def init(key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "..."]:
        return jnp.broadcast_to(jnp.linspace(first, last, shape[-1], dtype=jnp.float32), shape)

    return init


def inverse_softplus_of_steps(smallest: float, largest: float) -> Initializer:
    """Biases whose softplus, the step size, is log-uniform between two values."""

    def init(key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "..."]:
        low, high = math.log(smallest), math.log(largest)
        dt = jnp.exp(jax.random.uniform(key, shape, jnp.float32, low, high))
        return dt + jnp.log(-jnp.expm1(-dt))

    return init


def log_of_indices(key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """log 1, log 2, ... along the last axis."""
    del key
    return jnp.broadcast_to(jnp.log(jnp.arange(1, shape[-1] + 1, dtype=jnp.float32)), shape)


def log_uniform(key: PRNGKeyArray, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Logarithms of numbers that are uniform from 1 to 16."""
    return jnp.log(jax.random.uniform(key, shape, jnp.float32, 1.0, 16.0))
