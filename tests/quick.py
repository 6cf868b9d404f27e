"""Quick compilation for tests, which spend most of their time compiling small programs."""

import contextlib

import jax
from jax.experimental.compilation_cache import compilation_cache

OPTIONS = {"xla_backend_optimization_level": 0}


def jit(fn, **options):
    """`jax.jit` with few compiler optimizations."""
    return jax.jit(fn, compiler_options=OPTIONS, **options)


@contextlib.contextmanager
def compilation(folder):
    """Context that halves compile times and caches compiled programs in `folder`."""
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
