"""Low-rank adapters (LoRA) as functions of the tree of parameters: W + alpha / rank * A B.

Source: Hu et al. 2021, arXiv:2106.09685. The train step merges the adapters and differentiates with
respect to them, so every model and every loss works with them unchanged.
"""

import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from xlstm_jax.cells.logspace import common_dtype
from xlstm_jax.config import ConfigError
from xlstm_jax.errors import ArgumentError, quote
from xlstm_jax.sharding.axes import path_name
from xlstm_jax.train.config import LoraConfig
from xlstm_jax.train.trainable import ADAPTERS, has_adapters, nearest
from xlstm_jax.typing import Array, Float, PRNGKeyArray, PyTree

A, B = "lora_a", "lora_b"  # keys of an adapter, instead of the kernel in the tree


class Targets(NamedTuple):
    """The paths of the parameters that `LoraConfig.target` matches."""

    matrices: list[str]
    skipped: list[str]  # kernels that are not matrices


def targets(params: PyTree, cfg: LoraConfig) -> Targets:
    """The parameters that get adapters: matrices whose path `cfg.target` matches.

    A matrix is a `kernel` or `embedding` with the axes (in, out), possibly after an axis of layers
    and one of blocks on a diagonal; each of these has its own adapter. Convolutions, recurrent
    kernels, biases and scales are not matrices. The default target skips them, any other must not
    match them.

    Raises:
        ConfigError: no parameter matches, or a match is not a matrix.
    """
    leaves = [(path_name(p), x) for p, x in jax.tree_util.tree_leaves_with_path(params)]
    matches = [(path, x) for path, x in leaves if re.search(cfg.target, path)]
    result = Targets(
        [path for path, x in matches if _is_matrix(path, x.ndim)],
        [path for path, x in matches if not _is_matrix(path, x.ndim)],
    )
    if not matches:
        raise ConfigError(
            f"lora.target={quote(cfg.target)} must match the path of a parameter, got no match; "
            f"{nearest(cfg.target, [path for path, _ in leaves])}"
        )
    if result.skipped and (cfg.target != LoraConfig.target or not result.matrices):
        shapes = {path: x.shape for path, x in matches}
        raise ConfigError(
            f"lora.target={quote(cfg.target)} must match matrices only, got {result.skipped[0]} of "
            f"shape {shapes[result.skipped[0]]}; use {LoraConfig.target!r} for all matrices, or a "
            "pattern without convolutions, recurrent kernels, biases and scales."
        )
    return result


def _is_matrix(path: str, ndim: int) -> bool:
    *parents, name = path.split("/")
    num_axes = ndim - ("stack" in parents)  # without `layers`
    return name in ("kernel", "embedding") and parents[-1:] != ["conv"] and num_axes in (2, 3)


def init(params: PyTree, cfg: LoraConfig, key: PRNGKeyArray) -> PyTree:
    """Adapters for the targets: A is normal and B zero, so that merging them changes nothing.

    Returns a tree with the paths of the targets, each a dict of `lora_a`, `... in rank` with
    standard deviation in ** -0.5, and `lora_b`, `... rank out`.

    Raises:
        ConfigError: as `targets`.
    """
    leaves = {path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(params)}
    paths = targets(params, cfg).matrices
    pairs = {}
    for path, one_key in zip(paths, jax.random.split(key, len(paths)), strict=True):
        *batch, num_in, num_out = leaves[path].shape
        dtype = common_dtype(jnp.float32, leaves[path].dtype)
        a = num_in**-0.5 * jax.random.normal(one_key, (*batch, num_in, cfg.rank), dtype)
        pairs[path] = {A: a, B: jnp.zeros((*batch, cfg.rank, num_out), dtype)}
    return nest(pairs)


def merge(params: PyTree, adapters: PyTree, cfg: LoraConfig) -> PyTree:
    """The parameters with W + alpha / rank * A B, computed in float32 or wider, for every adapter.

    Raises:
        ArgumentError: an adapter does not fit a parameter.
    """
    pairs = flatten(adapters)
    leaves = {path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(params)}
    for path, pair in pairs.items():
        shape = leaves[path].shape if path in leaves else "absent"
        wanted = (*pair[A].shape[:-1], pair[B].shape[-1])
        if shape != wanted:
            raise ArgumentError(
                f"adapters must fit the parameters: {path} must have the shape {wanted}, but is "
                f"{shape}; use the adapters of this model."
            )

    def merged(path: Any, w: Any) -> Any:
        pair = pairs.get(path_name(path))
        return w if pair is None else _merge(w, pair, cfg.alpha / cfg.rank)

    return jax.tree_util.tree_map_with_path(merged, params)


def _merge(w: Any, pair: dict[str, Any], scale: float) -> Float[Array, "*batch K F"]:
    dtype = common_dtype(jnp.float32, w.dtype)
    a, b = (jnp.asarray(pair[name], dtype) for name in (A, B))
    # By default, accelerators round the factors to fewer bits than W has.
    product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    return (jnp.asarray(w, dtype) + scale * product).astype(w.dtype)


def attach(params: PyTree, cfg: LoraConfig, key: PRNGKeyArray) -> PyTree:
    """The parameters of a train state: with new adapters under the key "lora" unless rank is 0."""
    return {**params, ADAPTERS: init(params, cfg, key)} if cfg.rank else params


def attached_shapes(shapes: PyTree, cfg: LoraConfig) -> PyTree:
    """The shapes of `attach`, without computing anything."""
    return jax.eval_shape(lambda params: attach(params, cfg, jax.random.key(0)), shapes)


def merged(params: PyTree, cfg: LoraConfig) -> PyTree:
    """The parameters of the model, from those of a train state."""
    if not has_adapters(params):
        return params
    base = {name: tree for name, tree in params.items() if name != ADAPTERS}
    return merge(base, params[ADAPTERS], cfg)


def flatten(adapters: PyTree) -> dict[str, dict[str, Any]]:
    """Path of a kernel -> its adapter."""
    pairs: dict[str, dict[str, Any]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(adapters):
        kernel, _, name = path_name(path).rpartition("/")
        pairs.setdefault(kernel, {})[name] = leaf
    return pairs


def nest(pairs: dict[str, dict[str, Any]]) -> PyTree:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, pair in pairs.items():
        *folders, last = path.split("/")
        functools.reduce(lambda node, key: node.setdefault(key, {}), folders, tree)[last] = pair
    return tree
