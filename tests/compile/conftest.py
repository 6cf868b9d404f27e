"""Kernels compiled for TPUs and GPUs that are not here: `make test-compile`, which has compilers.

Elsewhere these tests are skipped, and say what is missing.
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
WAY_OUT = "; `make test-compile` has an environment for it"


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent.name == "compile":
            on_gpu = item.path.name.startswith("test_gpu")
            reason = _missing_for_gpus() if on_gpu else _missing_for_tpus()
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason + WAY_OUT))


@functools.cache
def _missing_for_tpus() -> str | None:
    if importlib.util.find_spec("libtpu") is None:
        return "libtpu is not installed here"
    return None


@functools.cache
def _missing_for_gpus() -> str | None:
    plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin")
    if not any(map(importlib.util.find_spec, plugins)):
        return "JAX's plugin for CUDA is not installed here"
    with common.compiled_for("sm_90"):
        return gpu.refusal()


def pytest_generate_tests(metafunc):
    if "chip" in metafunc.fixturenames:
        metafunc.parametrize("chip", CHIPS)
    if "gpu_chip" in metafunc.fixturenames:
        metafunc.parametrize("gpu_chip", GPU_CHIPS)
