"""`xlstm-jax describe CONFIG.py`: the sizes and costs of a run, from shapes alone."""

import collections
import dataclasses
from typing import Any

import jax

from xlstm_jax.cli import console, options
from xlstm_jax.cli.exit_codes import DONE
from xlstm_jax.flops import count_params, train_flops
from xlstm_jax.modules.lm import param_shapes
from xlstm_jax.plan.activations import residuals_per_device
from xlstm_jax.sharding.axes import path_name
from xlstm_jax.sharding.mesh import MESH_AXES
from xlstm_jax.sharding.placement import bytes_per_device
from xlstm_jax.sharding.rules import get_rules
from xlstm_jax.train.config import ExperimentConfig, check_divisibility
from xlstm_jax.train.optimizer import decay_mask, lr_factor_of, make_optimizer, weight_decay_of
from xlstm_jax.train.trainable import partition


@dataclasses.dataclass(frozen=True, kw_only=True)
class Describe(options.ConfigCommand):
    """Lists parameters, weight decay, FLOPs and memory per device of a config, without training.

    The devices of its mesh need not be attached; an axis of size -1 counts as 1.
    """


def run(argv: list[str]) -> int:
    """Runs `describe`; raises ConfigError if an option or the config is invalid."""
    args = options.parse_with_config("describe", Describe, argv, allow_presets=True)
    cfg = args.experiment
    params = param_shapes(cfg.model)
    weight_decay = weight_decay_of(cfg.train)
    decays = [
        flag and weight_decay > 0
        for flag in jax.tree.leaves(decay_mask(params, cfg.train.decay_pattern))
    ]
    rows, num_decayed = [], 0
    for (path, leaf), is_decayed in zip(jax.tree.leaves_with_path(params), decays, strict=True):
        shape = " x ".join(map(str, leaf.shape))
        rows.append([path_name(path), shape, f"{leaf.size:,}", "yes" if is_decayed else "no"])
        num_decayed += leaf.size if is_decayed else 0
    flops = train_flops(cfg.model, cfg.data.seq_len) / cfg.data.seq_len
    tokens = cfg.data.batch_size * cfg.data.seq_len
    num_params, steps = count_params(cfg.model), cfg.train.steps
    share = f"{num_decayed / num_params:.1%}"
    fields = {
        "blocks": f"{cfg.model.num_blocks}: {cfg.model.pattern}",
        "parameters": f"{num_params:,}",
        "decayed": f"{num_decayed:,} ({share}) by {weight_decay}",
        "FLOPs per token": f"{flops:.4g} (forward and backward)",
        "tokens per step": f"{tokens:,} = {cfg.data.batch_size} x {cfg.data.seq_len}",
        "total tokens": f"{tokens * steps:,} in {steps:,} steps",
        "total FLOPs": f"{flops * tokens * steps:.4g}",
        "memory, without temporaries": _memory(cfg, params),
    }
    if cfg.train.freeze is not None:
        trained, _ = partition(params, cfg.train.freeze)
        num_trained = sum(leaf.size for leaf in jax.tree.leaves(trained))
        fields["trained"] = f"{num_trained:,} ({num_trained / num_params:.1%})"
    if cfg.train.lr_factors:
        fields["learning rates"] = _learning_rates(cfg, params)
    console.print_table(["parameter", "shape", "count", "decayed"], rows)
    console.write("\n")
    console.print_fields(fields)
    return DONE


def _learning_rates(cfg: ExperimentConfig, params: Any) -> str:
    """Number of parameters by factor on the learning rate."""
    counts = collections.Counter[float]()
    factors = jax.tree.leaves(lr_factor_of(params, cfg.train))
    for factor, leaf in zip(factors, jax.tree.leaves(params), strict=True):
        counts[factor] += leaf.size
    return ", ".join(f"{count:,} x {factor}" for factor, count in sorted(counts.items()))


def _memory(cfg: ExperimentConfig, params: Any) -> str:
    """Memory of one device by purpose, without the temporaries of the compiled step."""
    rules = get_rules(cfg.mesh.rules_name())
    sizes = {name: max(getattr(cfg.mesh, name), 1) for name in MESH_AXES}
    check_divisibility(cfg, rules, sizes)
    params_bytes = bytes_per_device(params, rules, sizes, cfg.mesh.min_shard_size)
    moments = jax.eval_shape(make_optimizer(cfg.train).init, params)
    parts = {
        "parameters": params_bytes,
        "gradients": params_bytes,
        "optimizer": bytes_per_device(moments, rules, sizes, cfg.mesh.min_shard_size),
        "moving average": params_bytes if cfg.train.ema_decay else 0,
        "activations": residuals_per_device(cfg, sizes, jax.default_backend())[0],
    }
    breakdown = ", ".join(f"{name} {_mib(size)}" for name, size in parts.items() if size)
    mesh = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
    scope = f"each device of {mesh} under {cfg.mesh.rules_name()}" if mesh else "one device"
    return f"{_mib(sum(parts.values()))} on {scope} ({breakdown})"


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
