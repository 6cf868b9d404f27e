"""State and communication of a train step by formula, for the search and without a compiler.

Collectives by mesh axis:

- fsdp: all-gather every parameter for the forward and the backward pass, in the dtype of
  activations; reduce-scatter its gradient.
- data and seq: all-reduce the shards of gradients.
- tensor: all-reduce every matrix product with sharded features: in the forward pass, its
  recomputation, and the gradient of the input.
- seq: all-gather the state of every shard of the sequence; reduce-scatter its gradient.
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
from xlstm_jax.train import lora
from xlstm_jax.train.config import ExperimentConfig, LoraConfig, TrainConfig
from xlstm_jax.train.optimizer import make_optimizer
from xlstm_jax.train.trainable import partition

Sizes = dict[str, int]  # mesh axis -> devices along it


class Estimate(NamedTuple):
    """State and communication of a train step, per device."""

    params_bytes: int
    optimizer_bytes: int
    bytes_sent: dict[str, float]  # by kind of collective
    network_seconds: float


def estimate(cfg: ExperimentConfig, target: Target, sizes: Sizes) -> Estimate:
    """Estimates the state and communication of a train step on a mesh of these sizes."""
    bytes_sent: dict[str, float] = {}
    seconds = 0.0
    for kind, axes, num_bytes in _collectives(cfg, sizes):
        bytes_sent[kind] = bytes_sent.get(kind, 0.0) + num_bytes
        seconds += num_bytes / _bandwidth(target, sizes, axes)
    # The remat policy changes no shape: without it, most candidates of a search share one entry.
    state = _state_shapes(dataclasses.replace(cfg.model, remat="none"), cfg.train, cfg.lora)
    rules, min_shard_size = get_rules(cfg.mesh.rules_name()), cfg.mesh.min_shard_size
    params, moments = (bytes_per_device(tree, rules, sizes, min_shard_size) for tree in state)
    return Estimate(params, moments, bytes_sent, seconds)


@functools.lru_cache(maxsize=8)
def _state_shapes(model: LMConfig, train: TrainConfig, adapters: LoraConfig) -> tuple[Any, Any]:
    """Shapes of the parameters, and of the optimizer state with the moving average."""
    params = lora.attached_shapes(param_shapes(model), adapters)
    trained, _ = partition(params, train.freeze)
    moments = jax.eval_shape(make_optimizer(train).init, trained)
    return params, (moments, trained if train.ema_decay else None)


def _collectives(
    cfg: ExperimentConfig, sizes: Sizes
) -> Iterator[tuple[str, tuple[str, ...], float]]:
    """Kind, mesh axes and bytes sent per device of each collective of a step."""
    model, accumulation = cfg.model, cfg.train.accumulation
    width = jnp.dtype(model.dtype).itemsize
    data, fsdp, seq, tensor = (sizes[name] for name in MESH_AXES)
    tables = model.vocab_size * model.dim * (1 if model.tie_embeddings else 2)
    blocks = (count_params(model) - tables) * width * accumulation
    # Gradients of the embedding and the head are reduced in float32, once per step.
    gradients = blocks + tables * 4
    if fsdp > 1:
        gathered = 2 * blocks + tables * width * accumulation
        yield "all-gather", ("fsdp",), _ring(fsdp) * gathered / tensor
        yield "reduce-scatter", ("fsdp",), _ring(fsdp) * gradients / tensor
    if data * seq > 1:
        shard = gradients / (fsdp * tensor)
        yield "all-reduce", ("data", "seq"), 2 * _ring(data * seq) * shard
    num_sequences = cfg.data.batch_size / (data * fsdp)
    if tensor > 1:
        # Embedding lookup and logits need the full tables on every device.
        yield "all-gather", ("tensor",), _ring(tensor) * tables * width * accumulation
        yield "reduce-scatter", ("tensor",), _ring(tensor) * tables * 4
        to_model_width, from_model_width = _sharded_products(model)
        forward = to_model_width * (1 if model.remat == "none" else 2)
        activation = num_sequences * cfg.data.seq_len / seq * model.dim * width
        num_products = forward + from_model_width
        yield "all-reduce", ("tensor",), 2 * _ring(tensor) * num_products * activation
    if seq > 1:
        state = (seq - 1) * num_sequences * _state_bytes(model)
        yield "all-gather", ("seq",), state
        yield "reduce-scatter", ("seq",), state


def _ring(count: int) -> float:
    """Fraction of an array that each device sends in a ring all-gather or reduce-scatter."""
    return (count - 1) / count


def _bandwidth(target: Target, sizes: Sizes, axes: tuple[str, ...]) -> float:
    """Bandwidth of the slowest network within a group; inner mesh axes join neighboring devices."""
    outermost = min(MESH_AXES.index(axis) for axis in axes)
    extent = math.prod(sizes[name] for name in MESH_AXES[outermost:])
    is_intra = extent <= target.intra_size
    return target.chip.intra_bandwidth if is_intra else target.chip.inter_bandwidth


@functools.cache
def _sharded_products(cfg: LMConfig) -> tuple[int, int]:
    """Counts the kernels of all blocks that contract features sharded over tensor, and those that
    map the model width to such features.

    The outputs of the former are all-reduced, and the input gradients of the latter.
    """
    rules, counts = get_rules("fsdp_tensor"), [0, 0]
    for path, leaf in jax.tree_util.tree_leaves_with_path({"stack": param_shapes(cfg)["stack"]}):
        *names, last = logical_axes(path_name(path), leaf.ndim)
        is_sharded = [name is not None and "tensor" in rules[name] for name in (*names, last)]
        counts[0] += leaf.shape[0] * (last == "embed" and any(is_sharded))
        counts[1] += leaf.shape[0] * ("embed" in names and is_sharded[-1])
    return counts[0], counts[1]


@functools.cache
def _state_bytes(cfg: LMConfig) -> int:
    """Bytes of the recurrent state of one sequence, in all blocks that can shard the sequence."""
    states = [
        jax.eval_shape(lambda letter=letter: BLOCKS[letter].block(cfg, parent=None).init_state(1))
        for letter in cfg.pattern
        if getattr(cfg.options_of(letter), "sharded_over_time", True)
    ]
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(states))
