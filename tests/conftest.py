"""Settings and fixtures of all tests: eight virtual CPU devices, no rank promotion, seeded keys.

Signatures are checked at run time by jaxtyping and beartype: `pyproject.toml` names the packages.
"""

import collections
import gc
import importlib.metadata
import os
import pathlib
import sys

# `--device` is read here, as JAX and Triton read their variables when they are imported; workers of
# pytest-xdist read it from the environment.
if "--device" in sys.argv[:-1]:
    os.environ["XLSTM_TEST_DEVICE"] = sys.argv[sys.argv.index("--device") + 1]
if "XLSTM_TEST_DEVICE" not in os.environ:
    # Tests run on a CPU even if the machine has an accelerator: expected values are those of a CPU.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # Interpret Triton kernels; Triton reads this when it is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Cache compiled programs outside of the tree, for this process and those that tests start: a second
# run of the suite compiles little.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path.home() / ".cache" / "xlstm-jax" / "tests")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
# These flags halve the compile time of small programs: no parallel code generation, as two workers
# already use two cores, and the older code generator for fused loops. jaxlib 0.11 no longer has the
# latter, so its tests cover the newer one. Errors published in tests/golden use neither flag.
if "XLSTM_GOLDEN_ERRORS" not in os.environ:
    os.environ["XLA_FLAGS"] = " ".join(
        ["--xla_cpu_parallel_codegen_split_count=1"]
        + ["--xla_cpu_use_fusion_emitters=false"]
        * importlib.metadata.version("jaxlib").startswith("0.10.")
        + [os.environ.get("XLA_FLAGS", "")]
    )

import jax
import jaxtyping
import numpy as np
import pytest

# The import hook names this checker but imports only the package `tests`, so import it here.
import tests.typechecker  # noqa: F401
from xlstm_jax.ops import verdicts

# Tracing creates many long-lived objects, which garbage collection scans again and again; with the
# default thresholds it takes a twelfth of the suite's time.
gc.set_threshold(200_000, 50, 100)

DEVICE = os.environ.get("XLSTM_TEST_DEVICE")
if DEVICE is None:  # before the first computation, which fixes the number of devices
    jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


MAX_SLOW_CASES = 2
"""Cases of a parametrized slow test that `make test-slow` runs; `make test-all` runs all."""


@pytest.fixture(autouse=True, scope="session")
def no_verdicts():
    """Verdicts of `xlstm-jax check` on this machine do not affect tests."""
    verdicts._path, stored = lambda: None, verdicts._path
    yield
    verdicts._path = stored


def pytest_addoption(parser):
    """Adds the option to run the property tests of the ops on an accelerator."""
    parser.addoption(
        "--device",
        choices=("cpu", "gpu", "tpu"),
        help="run tests/ops on this device, with compiled kernels and sizes of their tiles",
    )


def pytest_configure(config):
    """Refuses a device that the machine does not have."""
    if DEVICE is not None and jax.default_backend() != DEVICE:
        raise pytest.UsageError(
            f"--device {DEVICE}: JAX's default backend is {jax.default_backend()!r}; install JAX "
            "for that device, or leave the option out."
        )


@pytest.hookimpl(tryfirst=True)  # before cases are selected by their marks
def pytest_collection_modifyitems(items):
    """Marks most cases of slow tests as exhaustive, all but a few that are spread evenly."""
    cases = collections.defaultdict(list)
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("exhaustive"):
            cases[item.nodeid.partition("[")[0]].append(item)
    for same in cases.values():
        steps = MAX_SLOW_CASES - 1
        selected = {same[step * (len(same) - 1) // steps].nodeid for step in range(MAX_SLOW_CASES)}
        for item in same:
            if len(same) > MAX_SLOW_CASES and item.nodeid not in selected:
                item.add_marker(pytest.mark.exhaustive)


MAX_MEMORY_MAPS = 30_000
"""Limit of a process. A compiled program takes tens of memory maps; above 65,530 XLA crashes on
Linux."""


@pytest.fixture(scope="module", autouse=True)
def clear_compiled_programs():
    """Clears JAX's caches after a module if compiled programs take too many memory maps."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > MAX_MEMORY_MAPS:
        jax.clear_caches()


@pytest.fixture(scope="module")
def one_device():
    """Makes the first device the default, so that meshes of all devices consist of it alone."""
    with jax.default_device(jax.devices()[0]):
        yield


@pytest.fixture
def key() -> jax.Array:
    """A JAX key with the same seed in every test."""
    return jax.random.key(0)


@pytest.fixture
def rng() -> np.random.Generator:
    """A NumPy generator with the same seed in every test."""
    return np.random.default_rng(0)


@pytest.fixture
def x64():
    """Enables float64 during one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def unchecked_types():
    """Disables the type checks that only tests have, to reach the checks of the library."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
