"""Who a process is, of how many; the roll-call itself is tested with real processes."""

import jax
import pytest

from xlstm_jax.config import ConfigError
from xlstm_jax.sharding import Processes, distributed, init_distributed
from xlstm_jax.sharding.devices import Devices, Share
from xlstm_jax.sharding.mesh import MeshConfig, make_mesh
from xlstm_jax.sharding.rules import get_rules


@pytest.mark.parametrize(
    "given,sentence",
    [
        (dict(num_processes=2), "belong together, got None, 2 and None; give all three, or none"),
        (dict(coordinator="a:1", num_processes=2, process_id=2), "process_id must lie in 0..1"),
        (dict(coordinator="a", num_processes=2, process_id=0), "must be HOST:PORT, got 'a'"),
    ],
)
def test_processes_that_cannot_be_are_refused(given, sentence):
    with pytest.raises(ConfigError, match=sentence):
        Processes(**given)


@pytest.mark.parametrize(
    "nodes,host",
    [("node[017-020,033]", "node017"), ("a-1,a-2", "a-1"), ("gpu7", "gpu7"), ("n1,n[3-4]", "n1")],
)
def test_a_step_of_slurm_meets_on_its_first_host(nodes, host):
    environment = {
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_PROCID": "3",
        "SLURM_STEP_NODELIST": nodes,
        "SLURM_JOB_ID": "1234567",
    }
    found = distributed._by_slurm(environment)
    assert found == {"coordinator": f"{host}:54567", "num_processes": 8, "process_id": 3}
    assert distributed._by_slurm(environment | {"SLURM_STEP_NUM_TASKS": "1"}) is None
    assert distributed._by_slurm({}) is None


def test_the_environment_of_jax_says_who_a_process_is():
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    found = distributed._by_environment(dict(zip(names, ("a:1", "2", "1"), strict=True)))
    assert found == {"coordinator": "a:1", "num_processes": 2, "process_id": 1}
    assert distributed._by_environment({names[0]: "a:1"}) is None


def test_one_process_joins_nobody(monkeypatch):
    monkeypatch.setattr(distributed, "call_the_roll", None)
    init_distributed(Processes(coordinator="a:1", num_processes=1, process_id=0))
    assert not jax.distributed.is_initialized()


def test_a_process_that_has_all_devices_feeds_all_rows():
    devices = Devices(make_mesh(fsdp=4), get_rules("fsdp"))
    assert devices.share_of_rows(16) == Share(0, 1)


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
def test_the_least_table_that_uses_a_mesh_is_taken(sizes, expected):
    assert MeshConfig(**sizes).rules_name() == expected
