"""What every test stands on: eight virtual CPU devices, no silent broadcasting, seeded keys.

Signatures are checked at run time by jaxtyping and beartype: `pyproject.toml` names the packages.
"""

import gc
import importlib.metadata
import os
import pathlib

# A test never needs an accelerator; where there is one, the numbers still have to be the CPU's.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Triton kernels are interpreted; read when Triton is imported.
os.environ.setdefault("TRITON_INTERPRET", "1")
# Compiled programs are cached outside of the tree, also for the processes that tests start:
# a second run of the suite compiles little.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path.home() / ".cache" / "xlstm-jax" / "tests")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
# XLA compiles a small program in half the time with one part per program, as two workers already
# keep two cores busy, and with the older code generator for fused loops. jaxlib 0.11 no longer has
# that one, so the newer is tested there. Published errors (tests/golden) are measured with neither.
if "XLSTM_GOLDEN_ERRORS" not in os.environ:
    os.environ["XLA_FLAGS"] = " ".join(
        ["--xla_cpu_parallel_codegen_split_count=1"]
        + ["--xla_cpu_use_fusion_emitters=false"]
        * importlib.metadata.version("jaxlib").startswith("0.10.")
        + [os.environ.get("XLA_FLAGS", "")]
    )

import jax
import numpy as np
import pytest

# The import hook names this checker and loads no more than `tests` itself, so it is loaded here.
import tests.typechecker  # noqa: F401

# Tracing makes many objects that live on; looking through all of them again and again for garbage
# takes a twelfth of the suite's time.
gc.set_threshold(200_000, 50, 100)

# Both must be said before the first computation: it freezes the number of devices.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


MAX_MEMORY_MAPS = 30_000
"""A compiled program takes tens of memory maps; past 65,530 of them XLA crashes on Linux."""


@pytest.fixture(scope="module", autouse=True)
def forget_programs():
    """Modules share compiled programs until these take too many memory maps."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > MAX_MEMORY_MAPS:
        jax.clear_caches()


@pytest.fixture(scope="module")
def one_device():
    """Whatever takes all devices takes the first one alone."""
    with jax.default_device(jax.devices()[0]):
        yield


@pytest.fixture
def key() -> jax.Array:
    """A key with the same seed in every test."""
    return jax.random.key(0)


@pytest.fixture
def rng() -> np.random.Generator:
    """NumPy's generator with the same seed in every test."""
    return np.random.default_rng(0)


@pytest.fixture
def x64():
    """Lets arrays be float64 while the test runs, and only then."""
    with jax.enable_x64(True):
        yield
