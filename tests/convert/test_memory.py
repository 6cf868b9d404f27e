"""Peak memory of loading weights onto a mesh, and what each device of it gets."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests.convert.baselines import random_params
from tests.convert.test_round_trip import assert_same_trees, model
from xlstm_jax import convert, sharding
from xlstm_jax.config import to_dict
from xlstm_jax.convert import shards
from xlstm_jax.data import DataConfig
from xlstm_jax.modules import LargeConfig
from xlstm_jax.train import ExperimentConfig, TrainConfig, checkpoint, rundir

# Prints peak memory while a folder is loaded onto eight devices, beyond that before, relative to
# the parameters. `clear_refs` resets the peak.
SCRIPT = """
import json, pathlib, sys
import jax
from xlstm_jax import convert, sharding

def status(name):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])

mesh = sharding.make_mesh(**json.loads(sys.argv[2]))
convert.tensors.import_safetensors()
jax.block_until_ready(jax.device_put(1.0, jax.devices()[-1]))
pathlib.Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
with jax.set_mesh(mesh):
    _, params = convert.load_hf(sys.argv[1])
size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
print(json.dumps({"peak": (status("VmHWM") - before) / size, "bytes": size}))
"""


def sized(dim: int, num_blocks: int, vocab_size: int):
    """A model of large blocks with the proportions of the published ones."""
    large = LargeConfig(num_heads=2, ffn_dim=8 * dim // 3)
    return model(dim=dim, pattern="M" * num_blocks, large=large, vocab_size=vocab_size)


def peak(folder, **axes) -> float:
    """Peak memory while a folder is loaded onto a mesh, relative to its parameters."""
    flags = "--xla_force_host_platform_device_count=8"
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder), json.dumps(axes)],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    return json.loads(process.stdout)["peak"]


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux")
def test_peak_memory_is_little_more_than_the_parameters(tmp_path):
    """Even if a single tensor, the embedding, is a quarter of them."""
    cfg = sized(768, 6, vocab_size=30_000)
    convert.save_hf(tmp_path / "hf", cfg, random_params(cfg), dtype="bfloat16")
    assert peak(tmp_path / "hf", fsdp=4, tensor=2) < 1.15


# Prints peak memory of loading the second model and joining its weights, beyond that after the
# first, a small one, relative to the weights.
PREPARE = """
import json, pathlib, sys
import jax
from xlstm_jax.generate import prepare_params
from xlstm_jax.modules import LM
from xlstm_jax.train import models

def status(name):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])

for folder in sys.argv[1:]:
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    cfg, params, *_ = models.load(folder, needs_tokenizer=False, unstacked=True)
    params = prepare_params(LM(cfg.model), {"params": params}, consume=True)
size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
print(json.dumps({"peak": (status("VmHWM") - before) / size}))
"""


def save_run(folder, model, params):
    cfg = ExperimentConfig(name="run", model=model, data=DataConfig(), train=TrainConfig())
    rundir.prepare(pathlib.Path(folder), cfg, {}, step=0)
    checkpoint.save_params(folder, params, to_dict(cfg))


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux")
@pytest.mark.parametrize("save", [convert.save_hf, save_run])
def test_joining_the_weights_for_decoding_needs_no_second_copy(save, tmp_path):
    folders = [str(tmp_path / name) for name in ("small", "large")]
    for folder, (dim, num_blocks) in zip(folders, ((128, 1), (768, 12)), strict=True):
        cfg = sized(dim, num_blocks, vocab_size=8_000)
        save(folder, cfg, random_params(cfg))
    process = subprocess.run(
        [sys.executable, "-c", PREPARE, *folders],
        # As the arrays of a real model do, these return their memory to the system.
        env=os.environ | {"JAX_PLATFORMS": "cpu", "MALLOC_MMAP_THRESHOLD_": "1000000"},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert json.loads(process.stdout)["peak"] < 1.15


@pytest.mark.parametrize("axes", [{"fsdp": 8}, {"fsdp": 2, "tensor": 4}, {"data": 8}])
def test_every_device_has_its_shard(axes, tmp_path):
    cfg = sized(384, 2, vocab_size=64)  # sharded from 2**18 elements per layer on
    params = random_params(cfg)
    convert.save_hf(tmp_path / "hf", cfg, params)
    with jax.set_mesh(sharding.make_mesh(**{"data": 1} | axes)):
        _, loaded = convert.load_hf(tmp_path / "hf")
    assert_same_trees(jax.device_get(loaded), params)
    kernel = loaded["stack"]["M"]["ffn"]["proj_up"]["kernel"]
    sharded_over = np.prod([size for axis, size in axes.items() if axis != "data"])
    assert {s.data.size for s in kernel.addressable_shards} == {kernel.size // sharded_over}


def test_only_the_layers_of_a_process_are_filled():
    """Of a parameter sharded over layers; a layer that no device here has is not read."""
    index = (slice(4, 6), slice(0, 3))
    host = np.zeros((2, 3), np.float32)
    parameter = shards.HostParameter((8, 3), None, (shards.Shard(index, host, (None,)),))
    assert list(parameter.parts(3)) == list(parameter.parts(6)) == []
    [(rest, part)] = parameter.parts(5)
    part[...] = 1
    assert rest == index[1:]
    np.testing.assert_array_equal(host, [[0, 0, 0], [1, 1, 1]])
