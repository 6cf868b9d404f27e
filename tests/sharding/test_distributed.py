"""Who a process is, of how many; `tests/train/test_processes.py` has real ones."""

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
    "variables,several",
    [
        (dict(), False),
        (dict(SLURM_STEP_NUM_TASKS="8"), True),
        (dict(SLURM_STEP_NUM_TASKS="1", SLURM_PROCID="0"), False),
        (dict(OMPI_COMM_WORLD_SIZE="2"), True),
        (dict(JOB_COMPLETION_INDEX="0"), True),
        (dict(TPU_WORKER_HOSTNAMES="a,b"), True),
    ],
)
def test_jax_detects_who_a_process_is_where_a_launcher_started_several(
    monkeypatch, variables, several
):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: calls.append(given))
    monkeypatch.setattr(distributed.os, "environ", variables)
    init_distributed()
    assert calls == ([dict(initialization_timeout=360)] if several else [])


def test_the_environment_of_jax_says_who_a_process_is(monkeypatch):
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: calls.append(given))
    for name, value in zip(names, ("a:1", "2", "1"), strict=True):
        monkeypatch.setenv(name, value)
    init_distributed(Processes(timeout_minutes=1))
    given = dict(coordinator_address="a:1", num_processes=2, process_id=1)
    assert calls == [given | dict(initialization_timeout=120)]
    monkeypatch.setenv(names[0], "localhost:1")  # nobody else is listened to
    init_distributed(Processes(timeout_minutes=1))
    assert calls[1]["coordinator_bind_address"] == "localhost:1"


def test_one_process_joins_nobody(monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", None)
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
