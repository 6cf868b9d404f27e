"""`xlstm-jax describe CONFIG.py`: what a run would be, from shapes alone; computes nothing."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from xlstm_jax.cli import console, options
from xlstm_jax.cli.exit_codes import DONE
from xlstm_jax.data import Batch
from xlstm_jax.flops import count_params, train_flops
from xlstm_jax.modules import LM
from xlstm_jax.train import ExperimentConfig, decay_mask, make_optimizer
from xlstm_jax.train.losses import language_model_loss


@dataclasses.dataclass(frozen=True, kw_only=True)
class Describe(options.WithConfig):
    """Shapes, parameters, the decayed set, FLOPs and memory of a config; trains nothing."""


def run(args: list[str]) -> int:
    """Returns 0.

    Raises:
        ConfigError: the config cannot be used.
    """
    cfg = options.parse_with_config("describe", Describe, args).experiment
    params = _params(cfg)
    mask = decay_mask(params, cfg.train.decay_pattern)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    decayed = dict(zip([path for path, _ in leaves], jax.tree.leaves(mask), strict=True))
    rows = [
        [
            jax.tree_util.keystr(path, simple=True, separator="/"),
            " x ".join(map(str, leaf.shape)),
            f"{leaf.size:,}",
            "yes" if decayed[path] else "no",
        ]
        for path, leaf in leaves
    ]
    console.table(["parameter", "shape", "count", "decayed"], rows)
    console.say("\n")
    num_decayed = sum(leaf.size for path, leaf in leaves if decayed[path])
    console.facts(_sizes(cfg, num_decayed) | _memory(cfg, params))
    return DONE


def _params(cfg: ExperimentConfig) -> Any:
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    return jax.eval_shape(LM(cfg.model).init, jax.random.key(0), tokens)["params"]


def _sizes(cfg: ExperimentConfig, num_decayed: int) -> dict[str, str]:
    model, data, train = cfg.model, cfg.data, cfg.train
    num_params = count_params(model)
    flops = train_flops(model, data.seq_len) / data.seq_len
    tokens = data.batch_size * data.seq_len
    return {
        "blocks": f"{model.num_blocks}: {model.pattern}",
        "parameters": f"{num_params:,}",
        "decayed": f"{num_decayed:,} ({num_decayed / num_params:.1%}) by {train.weight_decay}",
        "FLOPs per token": f"{flops:.4g} (forward and backward)",
        "tokens per step": f"{tokens:,} = {data.batch_size} x {data.seq_len}",
        "tokens in all": f"{tokens * train.steps:,} in {train.steps:,} steps",
        "FLOPs in all": f"{flops * tokens * train.steps:.4g}",
    }


def _memory(cfg: ExperimentConfig, params: Any) -> dict[str, str]:
    """Bytes on one device, by what they are for; temporaries of the compiled step are left out."""
    parts = {
        "parameters": _bytes(params),
        "gradients": _bytes(params),
        "optimiser": _bytes(jax.eval_shape(make_optimizer(cfg.train).init, params)),
        "activations": _bytes(_kept_for_backward(cfg, params)),
    }
    words = ", ".join(f"{name} {_mib(size)}" for name, size in parts.items())
    return {"memory, at least": f"{_mib(sum(parts.values()))} on one device ({words})"}


def _kept_for_backward(cfg: ExperimentConfig, params: Any) -> list[Any]:
    """Shapes of what the forward pass leaves for the backward pass, besides the parameters."""
    model, rows = LM(cfg.model), cfg.data.batch_size // cfg.train.accumulation
    shape = (rows, cfg.data.seq_len)
    ids, weights = jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.float32)
    batch = Batch(ids, ids, ids, weights, jax.ShapeDtypeStruct(shape[:1], jnp.int32))

    def backward(params, batch):
        def loss(params):
            return language_model_loss(model, params, batch, cfg.train)[0]

        return jax.tree.leaves(jax.vjp(loss, params)[1])

    closed = jax.make_jaxpr(backward)(params, batch)
    # A variable may be kept more than once; what was handed in lives elsewhere, constants do not
    # count.
    inputs = set(closed.jaxpr.invars)
    kept = {id(out): out for out in closed.jaxpr.outvars if not hasattr(out, "val")}
    return [out.aval for out in kept.values() if out not in inputs]


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
