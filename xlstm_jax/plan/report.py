"""What a compiled step takes: memory by kind, exchanges between chips, and bounds on its time."""

import dataclasses
import math
import time

import jax

from xlstm_jax.flops import count_params, train_flops
from xlstm_jax.plan.hlo import Collective, Program
from xlstm_jax.plan.step import Compiled, compile_step
from xlstm_jax.plan.topology import Target
from xlstm_jax.train.config import ExperimentConfig
from xlstm_jax.typing import PyTree

RECOMPUTED = {"none": 0.0, "full": 1.0, "names": 1.0, "offload": 1.0, "dots": 0.0}
"""Forward passes that the backward pass makes again, under each policy of rematerialisation; of
"dots" only what is no product."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """A step of a run on hardware that is not here; bytes and times are per device of JAX."""

    topology: str
    num_chips: int
    mesh: dict[str, int]
    rules: str
    num_params: int
    tokens_per_step: int
    flops: float  # of the model, of all devices together
    params_bytes: int
    optimizer_bytes: int
    temporary_bytes: int  # activations among them
    held_bytes: int  # in all
    memory_bytes: int  # what there is
    collectives: dict[str, tuple[int, float]]  # kind -> how many run, bytes a device sends
    seconds: dict[str, float]  # compute, memory, network: none of them can be beaten
    compile_seconds: float

    @property
    def fits(self) -> bool:
        return self.held_bytes <= self.memory_bytes

    @property
    def step_seconds(self) -> float:
        """No step is faster."""
        return max(self.seconds.values())

    @property
    def limit(self) -> str:
        """Which of the bounds that is."""
        return max(self.seconds, key=lambda name: self.seconds[name])


def plan(cfg: ExperimentConfig, target: Target) -> Plan:
    """Compiles the step of a run for `target` and reads everything off it.

    FLOPs are those of `flops.train_flops` and what is computed again; memory and exchanges are the
    compiled program's, with loops as often as they run. Times are what the data sheet's peaks
    allow: lower bounds, each as if the others took no time.

    Raises:
        ConfigError: the mesh does not fit the hardware, or the batch not the mesh.
    """
    start = time.perf_counter()
    compiled = compile_step(cfg, target)
    seconds = time.perf_counter() - start
    program = Program(str(compiled.program.as_text()))
    memory = compiled.program.memory_analysis()
    assert memory is not None
    held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    held += memory.output_size_in_bytes - memory.alias_size_in_bytes
    flops = cfg.data.batch_size * train_flops(cfg.model, cfg.data.seq_len)
    done = flops * (3 + RECOMPUTED[cfg.model.remat]) / 3 / len(target.devices)
    chip = target.chip
    return Plan(
        topology=target.name,
        num_chips=target.num_chips,
        mesh=dict(compiled.devices.mesh.shape),
        rules=cfg.mesh.rules_name(),
        num_params=count_params(cfg.model),
        tokens_per_step=cfg.data.batch_size * cfg.data.seq_len,
        flops=flops,
        params_bytes=_held(compiled.state.params),
        optimizer_bytes=_held(compiled.state.opt_state),
        temporary_bytes=memory.temp_size_in_bytes,
        held_bytes=held,
        memory_bytes=chip.memory,
        collectives=_by_kind(program.collectives),
        seconds={
            "compute": done / chip.flops,
            "memory": program.memory_traffic / chip.memory_rate,
            "network": _network_seconds(program.collectives, compiled, target),
        },
        compile_seconds=seconds,
    )


def _held(tree: PyTree) -> int:
    """Bytes of one device, of shapes with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _by_kind(collectives: list[Collective]) -> dict[str, tuple[int, float]]:
    found: dict[str, tuple[int, float]] = {}
    for one in collectives:
        times, sent = found.get(one.kind, (0, 0.0))
        found[one.kind] = times + one.times, sent + one.times * one.sent
    return found


def _network_seconds(collectives: list[Collective], compiled: Compiled, target: Target) -> float:
    """Each exchange at the rate of the slowest network that it crosses."""
    total = 0.0
    for one in collectives:
        is_near = len({device // target.near for device in one.group}) == 1
        rate = target.chip.near_rate if is_near else target.chip.far_rate
        total += one.times * one.sent / rate
    return total
