"""Parameters laid out for decoding: one tree per layer, joined projections, cast once.

A model is trained with the parameters of equal blocks stacked in one array, and with projections of
the same input as separate arrays in float32. Decoding one token reads every weight once, so that
slicing, concatenating or casting them for each token would take longer than the products.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from xlstm_jax.errors import ArgumentError, quote
from xlstm_jax.modules.config import LMConfig
from xlstm_jax.modules.kinds import BLOCKS, matrices_of
from xlstm_jax.modules.linear import joined_name, recorded_joins
from xlstm_jax.modules.lm import LM, head_kernel
from xlstm_jax.ops.int8 import Int8Kernel, quantize
from xlstm_jax.sharding.axes import path_name
from xlstm_jax.typing import Array, Int, PyTree

Joins = tuple[tuple[str, ...], ...]
"""Paths within a block of layers whose kernels are joined."""


def prepare_params(model: LM, variables: Any, *, dtype: DTypeLike | None = None) -> dict[str, Any]:
    """Parameters to be used in place of `variables`, in `generate` or `model.apply`.

    Results are those of `variables`, as kernels and embeddings are rounded to the dtype of
    activations at use anyway. They are no parameters to train.

    Args:
        dtype: of kernels and embeddings; None: that of activations, `cfg.dtype`, or float64 where
            parameters are. "int8": matrices and the head are rounded to 8 bits, with a scale for
            every output feature; the rest has the dtype of activations.

    Raises:
        ArgumentError: the dtype is unknown.
    """
    cfg, params = model.cfg, variables["params"]
    if is_int8 := dtype in ("int8", jnp.int8):
        dtype = None
    dtype = _dtype_of(cfg, params) if dtype is None else _check_dtype(dtype)
    prepare_layer = jax.jit(_prepare_layer, static_argnames=("letter", "joins", "dtype", "is_int8"))
    stack = {}
    for letter, tree in params["stack"].items():
        options = dict(letter=letter, joins=joins_of(cfg, letter, tree), dtype=dtype)
        stack[letter] = [
            prepare_layer(tree, jnp.asarray(layer), **options, is_int8=is_int8)
            for layer in range(cfg.pattern.count(letter))
        ]
    rest = {name: tree for name, tree in params.items() if name != "stack"}
    if is_int8:
        rest["lm_head"] = {"kernel": jax.jit(quantize)(head_kernel(cfg, params))}
    return {"params": {**_cast(rest, dtype), "stack": stack}}


def joins_of(cfg: LMConfig, letter: str, stacked: PyTree) -> Joins:
    """The layers of a block that share a product, found by tracing the block for one token."""
    block = BLOCKS[letter].block(cfg, parent=None)
    layer = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), stacked)
    x = jax.ShapeDtypeStruct((1, 1, cfg.dim), jnp.float32)
    with recorded_joins() as joins:
        jax.eval_shape(lambda params, x: block.apply({"params": params}, x), layer, x)
    return tuple(dict.fromkeys(joins))


def _prepare_layer(
    stacked: PyTree, layer: Int[Array, ""], *, letter: str, joins: Joins, dtype, is_int8: bool
) -> PyTree:
    tree = jax.tree.map(
        lambda leaf: jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False), stacked
    )
    if is_int8:
        tree = jax.tree_util.tree_map_with_path(functools.partial(_quantize, letter), tree)
    for paths in joins:
        tree = _join(tree, paths)
    return _cast(tree, dtype)


def _quantize(letter: str, path: Any, leaf: Array) -> Array | Int8Kernel:
    """The kernel in 8 bits, if it is one matrix; Muon's table tells."""
    name = f"stack/{letter}/{path_name(path)}"
    matrices = matrices_of(name) if name.endswith("/kernel") else None
    return quantize(leaf) if matrices is not None and matrices.axes == "io" else leaf


def _join(tree: Mapping[str, Any], paths: Sequence[str]) -> dict[str, Any]:
    """The tree with the layers at these paths, which have the same parent, as one layer."""
    first, *rest = paths[0].split("/", 1)
    if rest:
        inner = [path.split("/", 1)[1] for path in paths]
        return {**tree, first: _join(tree[first], inner)}
    layers = [tree[name] for name in paths]
    kernels = [layer["kernel"] for layer in layers]
    # The last axis is that of output features, for the scales of 8-bit kernels too.
    joined = {"kernel": jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=-1), *kernels)}
    if any("bias" in layer for layer in layers):
        zeros = [jnp.zeros(kernel.shape[1:], jnp.float32) for kernel in kernels]
        biases = [layer.get("bias", zero) for layer, zero in zip(layers, zeros, strict=True)]
        joined["bias"] = jnp.concatenate(biases)
    others = {name: value for name, value in tree.items() if name not in paths}
    return {**others, joined_name(paths): joined}


def _cast(tree: PyTree, dtype) -> PyTree:
    """Casts the leaves that a product or an embedding rounds to the dtype of activations."""

    def cast(path, leaf):
        is_cast = path_name(path[-1:]) in ("kernel", "embedding")
        return leaf.astype(dtype) if is_cast and not isinstance(leaf, Int8Kernel) else leaf

    is_leaf = lambda leaf: isinstance(leaf, Int8Kernel)  # noqa: E731
    return jax.tree_util.tree_map_with_path(cast, tree, is_leaf=is_leaf)


def _check_dtype(dtype: DTypeLike) -> jnp.dtype:
    names = ("float32", "bfloat16", "float64", "int8")
    if (name := getattr(dtype, "__name__", str(dtype))) not in names:
        raise ArgumentError(f"dtype must be one of {names}, got {quote(name)}; or pass None.")
    return jnp.dtype(dtype)


def _dtype_of(cfg: LMConfig, params: Any) -> jnp.dtype:
    table = params["token_embedding"]["embedding"]
    return table.dtype if table.dtype == jnp.float64 else jnp.dtype(cfg.dtype)


def is_prepared(variables: Any) -> bool:
    """Whether variables are the result of `prepare_params`."""
    stack = variables["params"]["stack"] if "stack" in variables.get("params", {}) else {}
    return any(isinstance(layers, list) for layers in stack.values())
