"""Importing the library and looking up hardware have no side effects on the process."""

import json
import os
import subprocess
import sys

import pytest

from pallas_kernels.aot import topologies

PROBE = """
import importlib, json, os, pkgutil
import flax, jax, optax, orbax.checkpoint, grain, matplotlib, tyro, triton  # noqa: F401
import jax.experimental.pallas.mosaic_gpu  # sets MOSAIC_GPU_CUDA_ROOT
import jax.experimental.pallas.tpu

def state():
    return dict(os.environ), {k: repr(v) for k, v in jax.config.values.items()}

before = state()
names = []
for package in ("xlstm_jax", "pallas_kernels"):
    module = importlib.import_module(package)
    for info in pkgutil.walk_packages(module.__path__, package + "."):
        if not info.name.endswith(("__main__", "evaluate.harness")):  # which needs lm-eval
            importlib.import_module(info.name)
            names.append(info.name)
after = state()
changes = [
    key for x, y in zip(before, after) for key in x.keys() | y.keys() if x.get(key) != y.get(key)
]
from jax._src import xla_bridge
has_devices = xla_bridge.backends_are_initialized()
print(json.dumps(dict(names=names, changes=changes, has_devices=has_devices)))
"""


def test_importing_every_module_starts_no_device_and_changes_no_environment_nor_jax_config():
    pytest.importorskip("triton")
    process = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    report = json.loads(process.stdout.splitlines()[-1])
    assert report["changes"] == []
    assert not report["has_devices"]
    assert {"pallas_kernels.aot.schedules", "xlstm_jax.plan.topology"} <= set(report["names"])


@pytest.mark.parametrize("user_value", [None, "mine"])
def test_libtpu_environment_is_restored(monkeypatch, user_value):
    monkeypatch.delenv("TPU_ACCELERATOR_TYPE", raising=False)
    if user_value is not None:
        monkeypatch.setenv("TPU_ACCELERATOR_TYPE", user_value)
    before = dict(os.environ)
    with topologies.libtpu_environment(LIBTPU_INIT_ARGS="--option"):
        assert os.environ["TPU_ACCELERATOR_TYPE"] == "v5litepod-4"
        assert os.environ["LIBTPU_INIT_ARGS"] == "--option"
    assert dict(os.environ) == before


def test_topology_description_leaves_the_environment_unchanged():
    before = dict(os.environ)
    try:
        topologies.tpu_slices("v5e", (2, 2))
    except RuntimeError as error:
        assert "xlstm-jax[compile]" in str(error)
    assert dict(os.environ) == before
