"""`jit` for tests: most of their time is spent compiling small programs that run once or twice."""

import contextlib

import jax
from jax.experimental.compilation_cache import compilation_cache

OPTIONS = {"xla_backend_optimization_level": 0}


def jit(fn, **options):
    """`jax.jit` with little optimisation."""
    return jax.jit(fn, compiler_options=OPTIONS, **options)


@contextlib.contextmanager
def compilation(folder):
    """Within, whatever is jitted compiles in half the time, and each program once for `folder`."""
    settings = {
        "jax_disable_most_optimizations": True,
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: jax.config.values[name] for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
