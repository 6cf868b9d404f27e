"""Detection of processes; `tests/train/test_processes.py` starts real ones."""

import jax
import pytest

from xlstm_jax.config import ConfigError
from xlstm_jax.sharding import Processes, distributed, init_distributed
from xlstm_jax.sharding.devices import Devices, Share
from xlstm_jax.sharding.mesh import MeshConfig, make_mesh
from xlstm_jax.sharding.rules import get_rules


@pytest.mark.parametrize(
    "fields,message",
    [
        (
            dict(num_processes=2),
            "must be set together, got None, 2 and None; set all three, or none",
        ),
        (dict(coordinator="a:1", num_processes=2, process_id=2), "process_id must be in 0..1"),
        (dict(coordinator="a", num_processes=2, process_id=0), "must be HOST:PORT, got 'a'"),
    ],
)
def test_invalid_processes_are_rejected(fields, message):
    with pytest.raises(ConfigError, match=message):
        Processes(**fields)


@pytest.mark.parametrize(
    "variables,is_multi_process",
    [
        (dict(), False),
        (dict(SLURM_STEP_NUM_TASKS="8"), True),
        (dict(SLURM_STEP_NUM_TASKS="1", SLURM_PROCID="0"), False),
        (dict(OMPI_COMM_WORLD_SIZE="2"), True),
        (dict(JOB_COMPLETION_INDEX="0"), True),
        (dict(TPU_WORKER_HOSTNAMES="a,b"), True),
    ],
)
def test_jax_detects_the_processes_of_a_launcher(monkeypatch, variables, is_multi_process):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **options: calls.append(options))
    monkeypatch.setattr(distributed.os, "environ", variables)
    init_distributed()
    assert calls == ([dict(initialization_timeout=360)] if is_multi_process else [])


def test_process_id_is_read_from_the_environment_variables_of_jax(monkeypatch):
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **options: calls.append(options))
    for name, value in zip(names, ("a:1", "2", "1"), strict=True):
        monkeypatch.setenv(name, value)
    init_distributed(Processes(timeout_minutes=1))
    options = dict(coordinator_address="a:1", num_processes=2, process_id=1)
    assert calls == [options | dict(initialization_timeout=120)]
    monkeypatch.setenv(names[0], "localhost:1")  # binds to no other interface
    init_distributed(Processes(timeout_minutes=1))
    assert calls[1]["coordinator_bind_address"] == "localhost:1"


def test_a_single_process_does_not_initialize_jax_distributed(monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", None)
    init_distributed(Processes(coordinator="a:1", num_processes=1, process_id=0))
    assert not jax.distributed.is_initialized()


def test_a_process_with_all_devices_feeds_the_global_batch():
    devices = Devices(make_mesh(fsdp=4), get_rules("fsdp"))
    assert devices.share_of_batch(16) == Share(0, 1)


@pytest.mark.parametrize(
    "parts,expected",
    [
        ([(4, 6), (6, 8)], Share(1, 2)),
        ([(2, 4), (2, 4)], Share(1, 4)),  # two devices with the same sequences
        ([(2, 4), (4, 6)], Share(0, 1)),  # not one of two halves
        ([(0, 3), (3, 6)], Share(0, 1)),  # not an equal part
    ],
)
def test_a_share_of_the_batch_is_an_aligned_block(monkeypatch, parts, expected):
    class Sharding:
        """Sequences (start, stop) of each device of this process."""

        def addressable_devices_indices_map(self, shape):
            return {device: (slice(*part),) for device, part in enumerate(parts)}

    monkeypatch.setattr(Devices, "batch_sharding", lambda self, ndim: Sharding())
    devices = Devices(make_mesh(), get_rules("data"))
    assert devices.share_of_batch(8) == expected


@pytest.mark.parametrize(
    "sizes,expected",
    [
        (dict(), "data"),
        (dict(fsdp=2), "fsdp"),
        (dict(tensor=2), "fsdp_tensor"),
        (dict(seq=2), "fsdp_seq"),
        (dict(rules="fsdp_tensor"), "fsdp_tensor"),
    ],
)
def test_auto_selects_the_first_rules_that_use_every_mesh_axis(sizes, expected):
    assert MeshConfig(**sizes).rules_name() == expected
