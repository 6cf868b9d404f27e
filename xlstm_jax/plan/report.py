"""What a step takes: memory by kind, exchanges between chips, and bounds on its time."""

import dataclasses
import math
import time
from typing import Any

import jax

from xlstm_jax.flops import count_params, train_flops
from xlstm_jax.plan.activations import cuts_of_batch, kept_per_row
from xlstm_jax.plan.collectives import Collective, collectives
from xlstm_jax.plan.formula import estimate
from xlstm_jax.plan.hlo import Program
from xlstm_jax.plan.step import Compiled, compile_step
from xlstm_jax.plan.topology import Target
from xlstm_jax.plan.traffic import memory_traffic
from xlstm_jax.sharding import get_rules
from xlstm_jax.train.config import ExperimentConfig, check_lengths
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
    activations_bytes: int  # of the temporaries, what forward leaves for backward, by shapes
    temporary_bytes: int  # all others
    held_bytes: int  # in all
    memory_bytes: int  # what there is
    collectives: dict[str, tuple[int, float]]  # kind -> how many run, bytes a device sends
    seconds: dict[str, float]  # compute, memory, network: none of them can be beaten
    compile_seconds: float
    refusal: str = ""  # why nothing was compiled and all of it is by formula; memory at the least

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
    allow: lower bounds, each as if the others took no time. For hardware that cannot be compiled
    for, memory and exchanges are by formula, and the plan says so.

    Raises:
        ConfigError: the mesh does not fit the hardware, or the batch not the mesh.
    """
    if target.refusal:
        return _by_formula(cfg, target)
    start = time.perf_counter()
    compiled = compile_step(cfg, target)
    seconds = time.perf_counter() - start
    program = Program(str(compiled.program.as_text()))
    exchanges = collectives(program)
    memory = compiled.program.memory_analysis()
    assert memory is not None
    held = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    held += memory.output_size_in_bytes - memory.alias_size_in_bytes
    sizes = dict(compiled.devices.mesh.shape)
    kept, _ = _kept(cfg, target, sizes)
    kept = min(kept, memory.temp_size_in_bytes)
    return Plan(
        **_facts(cfg, target, sizes),
        params_bytes=_held(compiled.state.params),
        optimizer_bytes=_held(compiled.state.opt_state),
        activations_bytes=kept,
        temporary_bytes=memory.temp_size_in_bytes - kept,
        held_bytes=held,
        collectives=_by_kind(exchanges),
        seconds={
            "compute": compute_seconds(cfg, target),
            "memory": memory_traffic(program) / target.chip.hbm_bandwidth,
            "network": _network_seconds(exchanges, compiled, target),
        },
        compile_seconds=seconds,
    )


def _by_formula(cfg: ExperimentConfig, target: Target) -> Plan:
    sizes = cfg.mesh.sizes(target.num_devices)
    check_lengths(cfg, get_rules(cfg.mesh.rules_name()), sizes)
    found = estimate(cfg, target, sizes)
    kept, copies = _kept(cfg, target, sizes)
    return Plan(
        **_facts(cfg, target, sizes),
        params_bytes=found.params_bytes,
        optimizer_bytes=found.optimizer_bytes,
        activations_bytes=kept,
        temporary_bytes=found.params_bytes + copies,  # gradients
        held_bytes=2 * found.params_bytes + found.optimizer_bytes + kept + copies,
        collectives={kind: (0, sent) for kind, sent in found.sent.items()},
        seconds={"compute": compute_seconds(cfg, target), "network": found.network_seconds},
        compile_seconds=0.0,
        refusal=target.refusal,
    )


def _kept(cfg: ExperimentConfig, target: Target, sizes: dict[str, int]) -> tuple[int, int]:
    """Bytes of activations on a device, and of parameters in their dtype."""
    with target.compiling():
        each, copies = kept_per_row(cfg)
    rows = cfg.data.batch_size // cfg.train.accumulation
    # Most of it are features, which devices along `tensor` share.
    cuts = cuts_of_batch(get_rules(cfg.mesh.rules_name()), sizes) * sizes["tensor"]
    return each * rows // cuts, copies // (sizes["fsdp"] * sizes["tensor"])


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
    """Of one step at the chip's peak, with what is computed again."""
    flops = cfg.data.batch_size * train_flops(cfg.model, cfg.data.seq_len)
    again = (3 + RECOMPUTED[cfg.model.remat]) / 3
    return flops * again / target.num_devices / target.chip.flops


def _held(tree: PyTree) -> int:
    """Bytes of one device, of shapes with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def _by_kind(exchanges: list[Collective]) -> dict[str, tuple[int, float]]:
    found: dict[str, tuple[int, float]] = {}
    for one in exchanges:
        times, sent = found.get(one.kind, (0, 0.0))
        found[one.kind] = times + one.times, sent + one.times * one.sent
    return found


def _network_seconds(exchanges: list[Collective], compiled: Compiled, target: Target) -> float:
    """Each exchange at the rate of the slowest network that it crosses."""
    total = 0.0
    for one in exchanges:
        is_near = len({device // target.near for device in one.group}) == 1
        rate = target.chip.intra_bandwidth if is_near else target.chip.inter_bandwidth
        total += one.times * one.sent / rate
    return total
