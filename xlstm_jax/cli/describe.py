"""`xlstm-jax describe CONFIG.py`: the sizes and costs of a run, from shapes only."""

import collections
import dataclasses
import math
from collections.abc import Mapping
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

    json: bool = False  # print the figures as JSON


def run(argv: list[str]) -> int:
    """Runs `describe`; raises ConfigError if an option or the config is invalid."""
    args = options.parse_with_config("describe", Describe, argv, allow_presets=True)
    cfg = args.experiment
    figures = describe(cfg)
    if args.json:
        console.print_json(figures)
        return DONE
    lines = [
        [
            parameter["name"],
            " x ".join(map(str, parameter["shape"])),
            f"{math.prod(parameter['shape']):,}",
            "yes" if parameter["decayed"] else "no",
        ]
        for parameter in figures["parameters"]
    ]
    console.print_table(["parameter", "shape", "count", "decayed"], lines)
    console.write("\n")
    console.print_fields(_fields(cfg, figures))
    return DONE


def describe(cfg: ExperimentConfig) -> dict[str, Any]:
    """The sizes and costs of a run as JSON values."""
    params = param_shapes(cfg.model)
    weight_decay = weight_decay_of(cfg.train)
    decays = [
        flag and weight_decay > 0
        for flag in jax.tree.leaves(decay_mask(params, cfg.train.decay_pattern))
    ]
    leaves = list(zip(jax.tree.leaves_with_path(params), decays, strict=True))
    flops = train_flops(cfg.model, cfg.data.seq_len) / cfg.data.seq_len
    tokens = cfg.data.batch_size * cfg.data.seq_len
    num_params = count_params(cfg.model)
    trained = partition(params, cfg.train.freeze)[0] if cfg.train.freeze is not None else params
    return {
        "pattern": cfg.model.pattern,
        "num_params": num_params,
        "num_decayed": sum(leaf.size for (_, leaf), is_decayed in leaves if is_decayed),
        "num_trained": sum(leaf.size for leaf in jax.tree.leaves(trained)),
        "weight_decay": weight_decay,
        "flops_per_token": flops,
        "tokens_per_step": tokens,
        "steps": cfg.train.steps,
        "total_tokens": tokens * cfg.train.steps,
        "total_flops": flops * tokens * cfg.train.steps,
        "memory_bytes": _memory(cfg, params),
        "lr_factors": _lr_factors(cfg, params) if cfg.train.lr_factors else {},
        "parameters": [
            {"name": path_name(path), "shape": leaf.shape, "decayed": is_decayed}
            for (path, leaf), is_decayed in leaves
        ],
    }


def _fields(cfg: ExperimentConfig, figures: Mapping[str, Any]) -> dict[str, str]:
    num_params, steps = figures["num_params"], figures["steps"]
    share = f"{figures['num_decayed'] / num_params:.1%}"
    fields = {
        "blocks": f"{cfg.model.num_blocks}: {cfg.model.pattern}",
        "parameters": f"{num_params:,}",
        "decayed": f"{figures['num_decayed']:,} ({share}) by {figures['weight_decay']}",
        "FLOPs per token": f"{figures['flops_per_token']:.4g} (forward and backward)",
        "tokens per step": f"{figures['tokens_per_step']:,} = {cfg.data.batch_size} x "
        f"{cfg.data.seq_len}",
        "total tokens": f"{figures['total_tokens']:,} in {steps:,} steps",
        "total FLOPs": f"{figures['total_flops']:.4g}",
        "memory, without temporaries": _memory_text(cfg, figures["memory_bytes"]),
    }
    if cfg.train.freeze is not None:
        share = f"{figures['num_trained'] / num_params:.1%}"
        fields["trained"] = f"{figures['num_trained']:,} ({share})"
    if figures["lr_factors"]:
        fields["learning rates"] = ", ".join(
            f"{count:,} x {factor}" for factor, count in figures["lr_factors"].items()
        )
    return fields


def _lr_factors(cfg: ExperimentConfig, params: Any) -> dict[float, int]:
    """Number of parameters by factor on the learning rate."""
    counts = collections.Counter[float]()
    factors = jax.tree.leaves(lr_factor_of(params, cfg.train))
    for factor, leaf in zip(factors, jax.tree.leaves(params), strict=True):
        counts[factor] += leaf.size
    return dict(sorted(counts.items()))


def _memory(cfg: ExperimentConfig, params: Any) -> dict[str, int]:
    """Memory of one device by purpose, without the temporaries of the compiled step."""
    rules, sizes = get_rules(cfg.mesh.rules_name()), _mesh_sizes(cfg)
    check_divisibility(cfg, rules, sizes)
    params_bytes = bytes_per_device(params, rules, sizes, cfg.mesh.min_shard_size)
    moments = jax.eval_shape(make_optimizer(cfg.train).init, params)
    return {
        "parameters": params_bytes,
        "gradients": params_bytes,
        "optimizer": bytes_per_device(moments, rules, sizes, cfg.mesh.min_shard_size),
        "moving average": params_bytes if cfg.train.ema_decay else 0,
        "activations": residuals_per_device(cfg, sizes, jax.default_backend())[0],
    }


def _mesh_sizes(cfg: ExperimentConfig) -> dict[str, int]:
    return {name: max(getattr(cfg.mesh, name), 1) for name in MESH_AXES}


def _memory_text(cfg: ExperimentConfig, parts: Mapping[str, int]) -> str:
    breakdown = ", ".join(f"{name} {_mib(size)}" for name, size in parts.items() if size)
    mesh = " x ".join(f"{name} {size}" for name, size in _mesh_sizes(cfg).items() if size > 1)
    scope = f"each device of {mesh} under {cfg.mesh.rules_name()}" if mesh else "one device"
    return f"{_mib(sum(parts.values()))} on {scope} ({breakdown})"


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
