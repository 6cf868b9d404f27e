"""Kernels compiled for TPUs that are not here: `make test-compile`, in an environment with libtpu.

Elsewhere these tests are skipped, and say so.
"""

import importlib.util

import pytest

from experiments.benchmarks import tpu_offline

CHIPS = [
    *(pytest.param(chip, id=chip) for chip in ("v5e", "v5p", "v6e")),
    *(pytest.param(chip, id=chip, marks=pytest.mark.slow) for chip in ("v4", "v7x")),
]


def pytest_collection_modifyitems(items):
    if importlib.util.find_spec("libtpu") is not None:
        tpu_offline.start()
    else:
        reason = "libtpu is not installed here; `make test-compile` has an environment with it"
        for item in items:
            if item.path.parent.name == "compile":
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_generate_tests(metafunc):
    if "chip" in metafunc.fixturenames:
        metafunc.parametrize("chip", CHIPS)
