"""State and communication of a train step by formula: for the search, and without a compiler.

Devices along fsdp all-gather every parameter for the forward and the backward pass, in the dtype of
activations, and reduce-scatter its gradient; devices along data all-reduce their shards of it.
Under tensor every product with sharded features is all-reduced, forward, recomputed and for the
gradient of its input; under seq devices exchange the state of every shard of the sequence.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from xlstm_jax.flops import count_params
from xlstm_jax.modules.config import LMConfig
from xlstm_jax.modules.kinds import BLOCKS
from xlstm_jax.modules.lm import param_shapes
from xlstm_jax.plan.topology import Target
from xlstm_jax.sharding.axes import logical_axes, path_name
from xlstm_jax.sharding.mesh import MESH_AXES
from xlstm_jax.sharding.placement import bytes_per_device
from xlstm_jax.sharding.rules import get_rules
from xlstm_jax.train.config import ExperimentConfig, TrainConfig
from xlstm_jax.train.optimizer import make_optimizer

Sizes = dict[str, int]  # mesh axis -> devices along it


class Estimate(NamedTuple):
    """Per device."""

    params_bytes: int
    optimizer_bytes: int
    sent: dict[str, float]  # kind of collective -> bytes
    network_seconds: float


def estimate(cfg: ExperimentConfig, target: Target, sizes: Sizes) -> Estimate:
    """State and communication of a step on a mesh of these sizes."""
    sent: dict[str, float] = {}
    seconds = 0.0
    for kind, axes, amount in _collectives(cfg, sizes):
        sent[kind] = sent.get(kind, 0.0) + amount
        seconds += amount / _bandwidth(target, sizes, axes)
    # Rematerialization changes no shape, and most candidates of a search differ in it.
    state = _state_shapes(dataclasses.replace(cfg.model, remat="none"), cfg.train)
    rules, min_shard_size = get_rules(cfg.mesh.rules_name()), cfg.mesh.min_shard_size
    params, moments = (bytes_per_device(tree, rules, sizes, min_shard_size) for tree in state)
    return Estimate(params, moments, sent, seconds)


@functools.lru_cache(maxsize=8)
def _state_shapes(model: LMConfig, train: TrainConfig) -> tuple[Any, Any]:
    """Of parameters and of the optimizer's moments."""
    params = param_shapes(model)
    return params, jax.eval_shape(make_optimizer(train).init, params)


def _collectives(
    cfg: ExperimentConfig, sizes: Sizes
) -> Iterator[tuple[str, tuple[str, ...], float]]:
    """Kind, mesh axes, and bytes that a device sends."""
    model, accumulation = cfg.model, cfg.train.accumulation
    width = jnp.dtype(model.dtype).itemsize
    data, fsdp, seq, tensor = (sizes[name] for name in MESH_AXES)
    tables = model.vocab_size * model.dim * (1 if model.tie_embeddings else 2)
    blocks = (count_params(model) - tables) * width * accumulation
    # The gradients of both tables are summed in float32, once.
    gradients = blocks + tables * 4
    if fsdp > 1:
        gathered = 2 * blocks + tables * width * accumulation
        yield "all-gather", ("fsdp",), _ring(fsdp) * gathered / tensor
        yield "reduce-scatter", ("fsdp",), _ring(fsdp) * gradients / tensor
    if data * seq > 1:
        each = gradients / (fsdp * tensor)
        yield "all-reduce", ("data", "seq"), 2 * _ring(data * seq) * each
    num_sequences = cfg.data.batch_size / (data * fsdp)
    if tensor > 1:
        # Every device looks up, and predicts, the whole vocabulary.
        yield "all-gather", ("tensor",), _ring(tensor) * tables * width * accumulation
        yield "reduce-scatter", ("tensor",), _ring(tensor) * tables * 4
        to_model_width, from_model_width = _sharded_products(model)
        forward = to_model_width * (1 if model.remat == "none" else 2)
        activation = num_sequences * cfg.data.seq_len / seq * model.dim * width
        sums = forward + from_model_width
        yield "all-reduce", ("tensor",), 2 * _ring(tensor) * sums * activation
    if seq > 1:
        state = (seq - 1) * num_sequences * _state_bytes(model)
        yield "all-gather", ("seq",), state
        yield "reduce-scatter", ("seq",), state


def _ring(count: int) -> float:
    """Share of an array that a device sends around a ring."""
    return (count - 1) / count


def _bandwidth(target: Target, sizes: Sizes, axes: tuple[str, ...]) -> float:
    """Of the slowest network that a group crosses; inner mesh axes are neighbors."""
    outermost = min(MESH_AXES.index(axis) for axis in axes)
    reach = math.prod(sizes[name] for name in MESH_AXES[outermost:])
    is_intra = reach <= target.intra_size
    return target.chip.intra_bandwidth if is_intra else target.chip.inter_bandwidth


@functools.cache
def _sharded_products(cfg: LMConfig) -> tuple[int, int]:
    """Kernels of all blocks that map features sharded over tensor to the model width, and those
    that map the model width to such features."""
    rules, counts = get_rules("fsdp_tensor"), [0, 0]
    for path, leaf in jax.tree_util.tree_leaves_with_path({"stack": param_shapes(cfg)["stack"]}):
        *names, last = logical_axes(path_name(path), leaf.ndim)
        is_sharded = [name is not None and "tensor" in rules[name] for name in (*names, last)]
        counts[0] += leaf.shape[0] * (last == "embed" and any(is_sharded))
        counts[1] += leaf.shape[0] * ("embed" in names and is_sharded[-1])
    return counts[0], counts[1]


@functools.cache
def _state_bytes(cfg: LMConfig) -> int:
    """Recurrent state of one sequence, in all blocks whose sequence can be sharded."""
    shardable = [
        letter
        for letter in cfg.pattern
        if getattr(cfg.options_of(letter), "sharded_over_time", True)
    ]
    states = [
        jax.eval_shape(lambda letter=letter: BLOCKS[letter].block(cfg, parent=None).init_state(1))
        for letter in shardable
    ]
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(states))
