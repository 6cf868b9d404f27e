"""A SLURM cluster of one node for tests: both daemons on the loopback interface, on free ports."""

import contextlib
import getpass
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

CONF = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
AuthType=auth/none
CredType=cred/none
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/linear
ReturnToService=2
KillWait=60
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_interval=1,bf_interval=1
SlurmdParameters=config_overrides
NodeName=localhost NodeAddr=127.0.0.1 NodeHostname=localhost CPUs=4
PartitionName=low Nodes=localhost Default=YES PriorityTier=1 GraceTime=60
PartitionName=high Nodes=localhost PriorityTier=2 PreemptMode=OFF
"""

COMMANDS = ("slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo")


def skip_without_slurm() -> None:
    """Skips the test where SLURM is not installed."""
    if missing := [name for name in COMMANDS if shutil.which(name) is None]:
        pytest.skip(f"SLURM is not installed (no {', '.join(missing)}): apt-get install slurm-wlm")


@contextlib.contextmanager
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Within the context, the commands of SLURM reach a cluster of this machine alone."""
    folder = Path(tempfile.mkdtemp(prefix="slurm"))  # a short path: it has Unix sockets
    for name in ("state", "spool"):
        (folder / name).mkdir()
    ports = _free_ports(2)
    text = CONF.format(folder=folder, user=getpass.getuser(), ports=ports)
    (folder / "slurm.conf").write_text(text)
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    daemons = []
    try:
        for name, *options in (["slurmctld", "-D"], ["slurmd", "-D", "-N", "localhost"]):
            with (folder / f"{name}.log").open("w") as log:
                daemons.append(subprocess.Popen([name, *options], stdout=log, stderr=log))
        wait("the node is idle", lambda: "idle" in output("sinfo", "--noheader"), seconds=60)
        yield
    finally:
        subprocess.run(["scancel", "--user", getpass.getuser()], check=False, timeout=60)
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in daemons:
            daemon.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


def output(*command: str) -> str:
    """The output of a command; empty if it fails, as while the daemons start."""
    process = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    return process.stdout


def wait(what: str, is_true: Callable[[], object], seconds: float = 300) -> None:
    """Waits until a condition holds; fails the test after `seconds`."""
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end, f"{what}: not within {seconds} s"
        time.sleep(0.3)


def state(job: str) -> str:
    """The state of a job in the queue; empty if it has ended."""
    return output("squeue", "--noheader", "--array", "--format=%T", f"--job={job}").strip()


def start_now(job: str) -> None:
    """Drops the two minutes that SLURM lets a requeued job wait."""
    subprocess.run(["scontrol", "update", f"jobid={job}", "starttime=now"], check=True)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
