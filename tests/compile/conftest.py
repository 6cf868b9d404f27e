"""Ahead-of-time compilation for TPUs and GPUs; `make test-compile` installs the compilers.

Without the compilers these tests are skipped, with the missing package as the reason.
"""

import functools
import importlib.util

import pytest

from pallas_kernels import common, gpu

CHIPS = [
    *(pytest.param(chip, id=chip) for chip in ("v5e", "v5p", "v6e")),
    *(pytest.param(chip, id=chip, marks=pytest.mark.slow) for chip in ("v4", "v7x")),
]
GPU_CHIPS = [
    *(pytest.param(chip, id=chip) for chip in ("sm_80", "sm_90", "sm_100")),
    *(pytest.param(chip, id=chip, marks=pytest.mark.slow) for chip in ("sm_86", "sm_89", "sm_120")),
]
WAY_OUT = "; run `make test-compile`"


def pytest_collection_modifyitems(items):
    """Skips tests whose compiler is not installed."""
    for item in items:
        if item.path.parent.name == "compile":
            on_gpu = item.path.name.startswith("test_gpu")
            reason = _missing_for_gpus() if on_gpu else _missing_for_tpus()
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason + WAY_OUT))


@functools.cache
def _missing_for_tpus() -> str | None:
    if importlib.util.find_spec("libtpu") is None:
        return "libtpu is not installed"
    return None


@functools.cache
def _missing_for_gpus() -> str | None:
    plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin")
    if not any(map(importlib.util.find_spec, plugins)):
        return "JAX's CUDA plugin is not installed"
    with common.compiled_for("sm_90"):
        return gpu.refusal()


def pytest_generate_tests(metafunc):
    """Runs tests with a `chip` or `gpu_chip` argument for every TPU or GPU target."""
    if "chip" in metafunc.fixturenames:
        metafunc.parametrize("chip", CHIPS)
    if "gpu_chip" in metafunc.fixturenames:
        metafunc.parametrize("gpu_chip", GPU_CHIPS)
