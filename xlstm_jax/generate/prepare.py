"""Parameters laid out for decoding: one tree per layer, joined projections, cast once.

A model is trained with the parameters of equal blocks stacked in one array, and with projections of
the same input as separate arrays in float32. Decoding one token reads every weight once, so that
slicing, concatenating or casting them for each token would take longer than the products.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from xlstm_jax.modules.config import LMConfig
from xlstm_jax.modules.kinds import BLOCKS
from xlstm_jax.modules.linear import joined_name, recorded_joins
from xlstm_jax.modules.lm import LM
from xlstm_jax.typing import Array, Int, PyTree

Joins = tuple[tuple[str, ...], ...]
"""Paths within a block of layers whose kernels are joined."""


def prepare_params(model: LM, variables: Any, *, dtype: DTypeLike | None = None) -> dict[str, Any]:
    """Parameters to be used in place of `variables`, in `generate` or `model.apply`.

    Results are equal: kernels and embeddings are rounded to the dtype of activations, as a product
    rounds them at use. They are no parameters to train.

    Args:
        dtype: of kernels and embeddings; None: that of activations, `cfg.dtype`, or float64 where
            parameters are.

    Raises:
        ArgumentError: `variables` are not those of the model.
    """
    cfg, params = model.cfg, variables["params"]
    dtype = _dtype_of(cfg, params) if dtype is None else jnp.dtype(dtype)
    prepare_layer = jax.jit(_prepare_layer, static_argnames=("joins", "dtype"))
    stack = {}
    for letter, tree in params["stack"].items():
        joins = joins_of(cfg, letter, tree)
        stack[letter] = [
            prepare_layer(tree, jnp.asarray(layer), joins=joins, dtype=dtype)
            for layer in range(cfg.pattern.count(letter))
        ]
    rest = {name: tree for name, tree in params.items() if name != "stack"}
    return {"params": {**_cast(rest, dtype), "stack": stack}}


def joins_of(cfg: LMConfig, letter: str, stacked: PyTree) -> Joins:
    """The layers of a block that share a product, found by tracing the block for one token."""
    block = BLOCKS[letter].block(cfg, parent=None)
    layer = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), stacked)
    x = jax.ShapeDtypeStruct((1, 1, cfg.dim), jnp.float32)
    with recorded_joins() as joins:
        jax.eval_shape(lambda params, x: block.apply({"params": params}, x), layer, x)
    return tuple(dict.fromkeys(joins))


def _prepare_layer(stacked: PyTree, layer: Int[Array, ""], joins: Joins, dtype) -> PyTree:
    tree = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, layer, 0, False), stacked)
    for paths in joins:
        tree = _join(tree, paths)
    return _cast(tree, dtype)


def _join(tree: Mapping[str, Any], paths: Sequence[str]) -> dict[str, Any]:
    """The tree with the layers at these paths, which have the same parent, as one layer."""
    first, *rest = paths[0].split("/", 1)
    if rest:
        inner = [path.split("/", 1)[1] for path in paths]
        return {**tree, first: _join(tree[first], inner)}
    layers = [tree[name] for name in paths]
    joined = {"kernel": jnp.concatenate([layer["kernel"] for layer in layers], axis=1)}
    if any("bias" in layer for layer in layers):
        zeros = lambda layer: jnp.zeros(layer["kernel"].shape[1:], jnp.float32)  # noqa: E731
        joined["bias"] = jnp.concatenate([layer.get("bias", zeros(layer)) for layer in layers])
    others = {name: value for name, value in tree.items() if name not in paths}
    return {**others, joined_name(paths): joined}


def _cast(tree: PyTree, dtype) -> PyTree:
    """Casts the leaves that a product or an embedding rounds to the dtype of activations."""

    def cast(path, leaf):
        return leaf.astype(dtype) if path[-1].key in ("kernel", "embedding") else leaf

    return jax.tree_util.tree_map_with_path(cast, tree)


def _dtype_of(cfg: LMConfig, params: Any):
    table = params["token_embedding"]["embedding"]
    return table.dtype if table.dtype == jnp.float64 else jnp.dtype(cfg.dtype)


def is_prepared(variables: Any) -> bool:
    """Whether variables are the result of `prepare_params`."""
    stack = variables["params"]["stack"] if "stack" in variables.get("params", {}) else {}
    return any(isinstance(layers, list) for layers in stack.values())
