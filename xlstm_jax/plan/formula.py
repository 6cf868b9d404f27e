"""State and exchanges of a step by formula: what the search begins with, and what lies beyond the
compiler.

Devices along fsdp gather every parameter forward and backward, in the dtype of activations, and add
up its gradient so that each keeps a part; then devices along data add up these parts. Under tensor
every block adds up its output, forward, again, and the gradient of its input; under seq the devices
exchange the memory that each span leaves.
"""

import collections
import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.hardware import Gpu, Tpu
from xlstm_jax.flops import count_params
from xlstm_jax.modules.config import LMConfig
from xlstm_jax.modules.kinds import BLOCKS
from xlstm_jax.modules.lm import param_shapes
from xlstm_jax.plan.topology import Target
from xlstm_jax.sharding import bytes_per_device, get_rules, logical_axes, path_name
from xlstm_jax.train.config import ExperimentConfig, TrainConfig
from xlstm_jax.train.optimizer import make_optimizer

GATHERS = {"tpu": 2.25, "gpu": 2.0}
"""How often a compiled step gathers the parameters of a block (`plan_scaling.py`): forward and
backward, and on TPUs those before the cell once more, for the gradient of its input."""


class Estimate(NamedTuple):
    """Of one device."""

    params_bytes: int
    optimizer_bytes: int
    sent: dict[str, float]  # kind of exchange -> bytes
    network_seconds: float


def estimate(cfg: ExperimentConfig, target: Target, sizes: dict[str, int]) -> Estimate:
    """State and exchanges of a step on a mesh of these sizes."""
    sent: dict[str, float] = {}
    seconds = 0.0
    for kind, axes, amount in _exchanges(cfg, target, sizes):
        sent[kind] = sent.get(kind, 0.0) + amount
        seconds += amount / _rate(target, sizes, axes)
    model = dataclasses.replace(cfg.model, remat="none")  # nothing to the state
    held = _state_bytes(model, cfg.train, cfg.mesh.rules_name(), tuple(sizes.items()))
    return Estimate(*held, sent, seconds)


@functools.cache
def _state_bytes(
    model: LMConfig, train: TrainConfig, rules: str, sizes: tuple[tuple[str, int], ...]
) -> tuple[int, int]:
    """Of parameters, and of what the optimiser holds."""
    params = param_shapes(model)
    moments = jax.eval_shape(make_optimizer(train).init, params)
    one, two = (bytes_per_device(tree, get_rules(rules), dict(sizes)) for tree in (params, moments))
    return one, two


def _exchanges(cfg: ExperimentConfig, target: Target, sizes: dict[str, int]):
    """Kind, axes of the mesh, and bytes that a device sends."""
    width = jnp.dtype(cfg.model.dtype).itemsize
    data, fsdp, seq, tensor = (sizes[name] for name in ("data", "fsdp", "seq", "tensor"))
    tables = cfg.model.vocab_size * cfg.model.dim * (1 if cfg.model.tie_embeddings else 2)
    blocks = count_params(cfg.model) - tables
    micro = cfg.train.accumulation
    times = GATHERS["gpu" if isinstance(target.chip, Gpu) else "tpu"]
    gathered = (times * blocks + tables) * width * micro
    # The gradients of both tables are added up in float32, once.
    summed = blocks * width * micro + tables * 4
    if fsdp > 1:
        yield "all-gather", ("fsdp",), _ring(fsdp) * gathered / tensor
        kind = "reduce-scatter"
        if _is_whole_slice(target, fsdp):
            kind, summed = "all-reduce", 2 * summed
        yield kind, ("fsdp",), _ring(fsdp) * summed / tensor
    parts = data * seq
    if parts > 1:
        each = (blocks * width * micro + tables * 4) / (fsdp * tensor)
        yield "all-reduce", ("data", "seq"), 2 * _ring(parts) * each
    tokens = cfg.data.batch_size * cfg.data.seq_len / (data * fsdp * seq)
    if tensor > 1:
        again = 0 if cfg.model.remat == "none" else 1
        sums = (2 + again) * _tensor_sums(cfg.model)
        yield "all-reduce", ("tensor",), 2 * _ring(tensor) * sums * tokens * cfg.model.dim * width
    if seq > 1:
        rows = cfg.data.batch_size / (data * fsdp)
        yield "all-gather", ("seq",), 3 * (seq - 1) * rows * _state_bytes_over_time(cfg.model)


def _ring(count: int) -> float:
    """What a device sends of an array around a ring."""
    return (count - 1) / count


def _is_whole_slice(target: Target, fsdp: int) -> bool:
    """libtpu adds up in every chip what all chips of a slice are to share: twice the bytes. With 16
    or fewer it passes parts around while it multiplies."""
    return isinstance(target.chip, Tpu) and fsdp == target.near > 16


def _rate(target: Target, sizes: dict[str, int], axes: tuple[str, ...]) -> float:
    """Of the slowest network that a group crosses; inner axes are neighbours."""
    names = ("data", "fsdp", "seq", "tensor")
    reach = 1
    for name in reversed(names[min(names.index(axis) for axis in axes) :]):
        reach *= sizes[name]
    return target.chip.intra_bandwidth if reach <= target.near else target.chip.inter_bandwidth


@functools.cache
def _tensor_sums(cfg: LMConfig) -> int:
    """Sums over tensor in a forward pass: one per kernel that maps sharded features to the model
    width, and one per layer that is sharded by heads alone, whose outputs are gathered."""
    rules, sums, axes_of = get_rules("fsdp_tensor"), 0, collections.defaultdict(set)
    for path, leaf in jax.tree_util.tree_leaves_with_path(param_shapes(cfg)["stack"]):
        name = "stack/" + path_name(path)
        axes = logical_axes(name, leaf.ndim)
        _, letter, layer, *_ = name.split("/")
        sharded = {axis for axis in axes if axis and "tensor" in rules[axis]}
        axes_of[letter, layer] |= sharded
        sums += cfg.pattern.count(letter) * bool(sharded and axes[-1] == "embed")
    by_heads = [letter for (letter, _), axes in axes_of.items() if axes == {"heads"}]
    return sums + sum(map(cfg.pattern.count, by_heads))


def _state_bytes_over_time(cfg: LMConfig) -> int:
    """State of one sequence, in the blocks whose sequence devices share."""
    total = 0
    for letter, count in collections.Counter(cfg.pattern).items():
        if getattr(cfg.options_of(letter), "sharded_over_time", True):
            block = BLOCKS[letter].block(cfg, parent=None)
            leaves = jax.tree.leaves(jax.eval_shape(lambda block=block: block.init_state(1)))
            total += count * sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)
    return total
