"""The resources of a train step: memory by kind, collectives, and lower bounds on its time."""

import dataclasses
import time
from typing import Any

import jax

from xlstm_jax.flops import count_params, train_flops
from xlstm_jax.plan.activations import residuals_per_device
from xlstm_jax.plan.collectives import Collective, collectives
from xlstm_jax.plan.formula import estimate
from xlstm_jax.plan.hlo import Program
from xlstm_jax.plan.topology import Target
from xlstm_jax.plan.traffic import memory_traffic
from xlstm_jax.sharding.devices import make_devices
from xlstm_jax.sharding.placement import shard_bytes
from xlstm_jax.sharding.rules import get_rules
from xlstm_jax.train.config import ExperimentConfig, check_divisibility
from xlstm_jax.train.program import TrainProgram
from xlstm_jax.typing import PyTree

RECOMPUTED_PASSES = {"none": 0.0, "full": 1.0, "names": 1.0, "offload": 1.0, "dots": 0.0}
"""Rematerialization policy -> forward passes that the backward pass recomputes; "dots" recomputes
no matrix product."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The resources of a train step on a target; bytes and seconds are per JAX device."""

    topology: str
    num_chips: int
    mesh: dict[str, int]
    rules: str
    num_params: int
    tokens_per_step: int
    flops: float  # of one step of the model, over all devices
    params_bytes: int
    optimizer_bytes: int
    activations_bytes: int  # residuals saved for the backward pass, from shapes
    temporary_bytes: int  # temporaries other than residuals
    peak_bytes: int  # arguments, new outputs and temporaries together
    memory_bytes: int  # memory of the device
    collectives: dict[str, tuple[int, float]]  # kind -> executions, bytes sent
    seconds: dict[str, float]  # lower bounds by resource: compute, memory, network
    compile_seconds: float
    refusal: str = ""  # why nothing was compiled; all is then by formula, memory a lower bound

    @property
    def fits(self) -> bool:
        """Whether the peak memory fits the device."""
        return self.peak_bytes <= self.memory_bytes

    @property
    def step_seconds(self) -> float:
        """Lower bound on the time of a step: the largest of `seconds`."""
        return max(self.seconds.values())

    @property
    def limit(self) -> str:
        """The resource with the largest lower bound."""
        return max(self.seconds, key=lambda name: self.seconds[name])


def plan(cfg: ExperimentConfig, target: Target) -> Plan:
    """Compiles the train step of a run for `target` and reports the program's resources.

    FLOPs are those of `flops.train_flops`, and their time includes recomputation. Memory and
    collectives are those of the compiled program, times the trip counts of its loops. Times are
    lower bounds by the peak rates of data sheets, each as if the others took no time. Without a
    compiler for the target everything is estimated by formula, and `Plan.refusal` gives the reason.

    Raises:
        ConfigError: the mesh does not fit the target, or the batch does not fit the mesh.
    """
    if target.refusal:
        return estimated_plan(cfg, target)
    start = time.perf_counter()
    program, compiled = compile_step(cfg, target)
    compile_seconds = time.perf_counter() - start
    hlo = Program(str(compiled.as_text()))
    all_collectives = collectives(hlo)
    memory = compiled.memory_analysis()
    assert memory is not None
    state, sizes = program.arguments[0], dict(program.devices.mesh.shape)
    temporary = memory.temp_size_in_bytes
    activations = min(_residuals(cfg, target, sizes)[0], temporary)
    new_outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return Plan(
        **_facts(cfg, target, sizes),
        params_bytes=_shard_bytes(state.params),
        optimizer_bytes=_shard_bytes((state.opt_state, state.ema)),
        activations_bytes=activations,
        temporary_bytes=temporary - activations,
        peak_bytes=memory.argument_size_in_bytes + temporary + new_outputs,
        collectives=_by_kind(all_collectives),
        seconds={
            "compute": compute_seconds(cfg, target),
            "memory": memory_traffic(hlo) / target.chip.hbm_bandwidth,
            "network": _network_seconds(all_collectives, target),
        },
        compile_seconds=compile_seconds,
    )


def compile_step(cfg: ExperimentConfig, target: Target) -> tuple[TrainProgram, jax.stages.Compiled]:
    """The training program of a run and its compiled step, from shapes alone; errors of `plan`."""
    devices = make_devices(cfg.mesh, target.devices)
    check_divisibility(cfg, devices.rules, devices.mesh.shape)
    program = TrainProgram(cfg, devices)
    with target.compiling():
        return program, program.compile()


def estimated_plan(cfg: ExperimentConfig, target: Target) -> Plan:
    """`plan` by formula: memory is a lower bound, with gradients as the only temporaries."""
    sizes = cfg.mesh.sizes(target.num_devices)
    check_divisibility(cfg, get_rules(cfg.mesh.rules_name()), sizes)
    step = estimate(cfg, target, sizes)
    activations, copies = _residuals(cfg, target, sizes)
    gradients = step.params_bytes + copies  # with the cast copies of parameters
    return Plan(
        **_facts(cfg, target, sizes),
        params_bytes=step.params_bytes,
        optimizer_bytes=step.optimizer_bytes,
        activations_bytes=activations,
        temporary_bytes=gradients,
        peak_bytes=step.params_bytes + step.optimizer_bytes + gradients + activations,
        collectives={kind: (0, sent) for kind, sent in step.bytes_sent.items()},
        seconds={"compute": compute_seconds(cfg, target), "network": step.network_seconds},
        compile_seconds=0.0,
        refusal=target.refusal,
    )


def _residuals(cfg: ExperimentConfig, target: Target, sizes: dict[str, int]) -> tuple[int, int]:
    with target.compiling():
        return residuals_per_device(cfg, sizes, target.chip.target)


def _facts(cfg: ExperimentConfig, target: Target, sizes: dict[str, int]) -> dict[str, Any]:
    return {
        "topology": target.name,
        "num_chips": target.num_chips,
        "mesh": sizes,
        "rules": cfg.mesh.rules_name(),
        "num_params": count_params(cfg.model),
        "tokens_per_step": cfg.data.batch_size * cfg.data.seq_len,
        "flops": cfg.data.batch_size * train_flops(cfg.model, cfg.data.seq_len),
        "memory_bytes": target.chip.hbm_bytes,
    }


def compute_seconds(cfg: ExperimentConfig, target: Target) -> float:
    """Seconds of one step at the peak rate of the chip, recomputation included."""
    flops = cfg.data.batch_size * train_flops(cfg.model, cfg.data.seq_len)
    # Forward and backward are three forward passes: the backward pass costs two.
    factor = (3 + RECOMPUTED_PASSES[cfg.model.remat]) / 3
    return flops * factor / target.num_devices / target.chip.flops


def _shard_bytes(tree: PyTree) -> int:
    """Bytes per device of a tree of shapes with shardings."""
    return sum(shard_bytes(leaf, leaf.sharding) for leaf in jax.tree.leaves(tree))


def _by_kind(all_collectives: list[Collective]) -> dict[str, tuple[int, float]]:
    totals: dict[str, tuple[int, float]] = {}
    for c in all_collectives:
        count, sent = totals.get(c.kind, (0, 0.0))
        totals[c.kind] = count + c.count, sent + c.count * c.bytes_sent
    return totals


def _network_seconds(all_collectives: list[Collective], target: Target) -> float:
    """Seconds of all collectives, each at the bandwidth of the slowest network in its group."""
    chip = target.chip

    def bandwidth(group: tuple[int, ...]) -> float:
        is_intra = len({device // target.intra_size for device in group}) == 1
        return chip.intra_bandwidth if is_intra else chip.inter_bandwidth

    return sum(c.count * c.bytes_sent / bandwidth(c.group) for c in all_collectives)
