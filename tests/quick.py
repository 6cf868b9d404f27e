"""`jit` for tests: most of their time is spent compiling small programs that run once or twice."""

import contextlib
import functools

import jax
from jax.experimental.compilation_cache import compilation_cache

OPTIONS = {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
"""Less optimisation, a quarter of the time to compile (jaxlib 0.10; half of it with 0.11)."""


def _is_known(name: str, value: object) -> bool:
    """Whether this jaxlib's compiler has the option; options come and go between versions."""
    try:
        jax.jit(lambda x: x, compiler_options={name: value})(0.0)
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" in str(error):
            return False
        raise
    return True


@functools.cache
def compiler_options() -> dict[str, object]:
    """Those of `OPTIONS` that this jaxlib knows."""
    return {name: value for name, value in OPTIONS.items() if _is_known(name, value)}


def jit(fn, **options):
    """`jax.jit` with little optimisation."""
    return jax.jit(fn, compiler_options=compiler_options(), **options)


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
