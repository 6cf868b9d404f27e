"""Ahead-of-time compilation for TPUs and GPUs; `make test-compile` installs the compilers.

Without the compilers these tests are skipped; the reason names the missing package.
"""

import functools
import importlib.util

import pytest

from pallas_kernels import gpu

CHIPS = [
    *(pytest.param(chip, id=chip) for chip in ("v5e", "v5p", "v6e")),
    *(pytest.param(chip, id=chip, marks=pytest.mark.slow) for chip in ("v4", "v7x")),
]
GPU_CHIPS = [
    *(pytest.param(chip, id=chip) for chip in ("sm_80", "sm_90", "sm_100")),
    *(pytest.param(chip, id=chip, marks=pytest.mark.slow) for chip in ("sm_86", "sm_89", "sm_120")),
]


def pytest_collection_modifyitems(items):
    """Skips tests whose compiler is not installed."""
    for item in items:
        if item.path.parent.name == "compile":
            is_gpu_test = item.path.name.startswith(("test_gpu", "test_mosaic"))
            refusal = _gpu_refusal() if is_gpu_test else _tpu_refusal()
            if refusal is not None:
                item.add_marker(pytest.mark.skip(reason=f"{refusal}; run `make test-compile`"))


@functools.cache
def _tpu_refusal() -> str | None:
    if importlib.util.find_spec("libtpu") is None:
        return "libtpu is not installed"
    return None


@functools.cache
def _gpu_refusal() -> str | None:
    plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin")
    if not any(map(importlib.util.find_spec, plugins)):
        return "JAX's CUDA plugin is not installed"
    for module in ("triton", "jax_triton"):
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
    # Other refusals, such as versions that do not work together, are failures of the tests.
    return None if gpu.interpreter_refusal() else "Triton interprets kernels"


def pytest_generate_tests(metafunc):
    """Parametrizes `chip` and `gpu_chip` over the TPU and GPU targets."""
    if "chip" in metafunc.fixturenames:
        metafunc.parametrize("chip", CHIPS)
    if "gpu_chip" in metafunc.fixturenames:
        metafunc.parametrize("gpu_chip", GPU_CHIPS)
