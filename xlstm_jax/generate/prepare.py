"""Parameters laid out for decoding: one tree per layer, joined projections, cast once.

A model is trained with the parameters of equal blocks stacked in one array, and with projections of
the same input as separate arrays in float32. Decoding one token reads every weight once, so that
slicing, concatenating or casting them for each token would take longer than the products.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from xlstm_jax.errors import ArgumentError, quote
from xlstm_jax.modules.config import LMConfig
from xlstm_jax.modules.kinds import BLOCKS, matrices_of
from xlstm_jax.modules.linear import joined_name, recorded_joins
from xlstm_jax.modules.lm import LM, check_params, head_kernel, param_shapes
from xlstm_jax.modules.loops import as_list
from xlstm_jax.ops.int8 import Int8Kernel, quantize
from xlstm_jax.sharding.axes import path_name
from xlstm_jax.typing import Array, PyTree

Joins = tuple[tuple[str, ...], ...]
"""Paths within a block of layers whose kernels are joined."""


def prepare_params(
    model: LM, variables: Any, *, dtype: DTypeLike | None = None, consume: bool = False
) -> dict[str, Any]:
    """Parameters to be used instead of `variables`, in `generate` or `model.apply`.

    Results are those of `variables`, as kernels and embeddings are rounded to the dtype of
    activations at use anyway. They cannot be trained.

    Args:
        dtype: of kernels and embeddings; None: that of activations, `cfg.dtype`, or float64 where
            parameters are. "int8": matrices and the head are rounded to 8 bits, with a scale for
            every output feature; the rest has the dtype of activations.
        consume: delete each array of `variables` when it is converted, which saves a second copy of
            all weights. They cannot be used afterwards.

    Raises:
        ArgumentError: the dtype is unknown, or `variables` are not those of the model.
    """
    if "params" not in variables:
        raise ArgumentError(
            "variables must be a dict with the key 'params', as `init` returns, got the keys "
            f"{quote(sorted(variables))}; write {{'params': params}}."
        )
    cfg, params = model.cfg, variables["params"]
    if is_int8 := dtype in ("int8", jnp.int8):
        dtype = None
    dtype = _dtype_of(cfg, params) if dtype is None else _check_dtype(dtype)
    stack = {}
    for letter, tree in params["stack"].items():
        joins = joins_of(cfg, letter, tree)
        convert = functools.partial(
            _convert, letter, cfg.pattern.count(letter), dtype, is_int8=is_int8, consume=consume
        )
        layers = _unstack(tree, cfg.pattern.count(letter), convert)
        for number, layer in enumerate(layers):  # one at a time: its parts are freed
            for paths in joins:
                layer = _join(layer, paths, consume=consume)
            layers[number] = layer
        stack[letter] = layers
    rest = {name: tree for name, tree in params.items() if name != "stack"}
    if is_int8:
        rest["lm_head"] = {"kernel": _quantize(head_kernel(cfg, params))}
    return {"params": {**_cast(rest, dtype), "stack": stack}}


def joins_of(cfg: LMConfig, letter: str, params: PyTree) -> Joins:
    """The layers of a block that share a product, by tracing the block for one token."""
    block = BLOCKS[letter].block(cfg, parent=None)
    if isinstance(params, list):
        layer = params[0]
    else:
        layer = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), params)
    x = jax.ShapeDtypeStruct((1, 1, cfg.dim), jnp.float32)
    try:
        with recorded_joins() as joins:
            jax.eval_shape(lambda params, x: block.apply({"params": params}, x), layer, x)
    except Exception:  # of Flax; `check_params` tells what differs
        if not isinstance(params, list):
            check_params({letter: params}, {letter: param_shapes(cfg)["stack"][letter]})
        raise
    return tuple(dict.fromkeys(joins))


def _unstack(
    tree: PyTree, num_layers: int, convert: Callable[[Any, list[Array] | Array], list[Any]]
) -> list[PyTree]:
    """The trees of the layers, of a stacked tree or a list of them, converted leaf by leaf."""
    if isinstance(tree, list):
        leaves = list(zip(*map(jax.tree_util.tree_leaves_with_path, tree), strict=True))
        by_path = [(layers[0][0], [leaf for _, leaf in layers]) for layers in leaves]
        structure = jax.tree.structure(tree[0])
    else:
        by_path = jax.tree_util.tree_leaves_with_path(tree)
        structure = jax.tree.structure(tree)
    converted = [convert(path, leaf) for path, leaf in by_path]
    return [structure.unflatten(leaf[n] for leaf in converted) for n in range(num_layers)]


def _convert(
    letter: str,
    num_layers: int,
    dtype: jnp.dtype,
    path: Any,
    leaf: Array | list[Array],
    *,
    is_int8: bool,
    consume: bool,
) -> list[Any]:
    """The layers of a parameter, cast or quantized."""
    name = f"stack/{letter}/{path_name(path)}"
    is_kernel = name.endswith("/kernel")
    matrices = matrices_of(name) if is_int8 and is_kernel else None
    is_matrix = matrices is not None and matrices.axes == "io"
    is_cast = is_kernel and jax.tree.leaves(leaf)[0].dtype != dtype
    if isinstance(leaf, list) and not is_matrix and not is_cast:
        return leaf  # a compiled function would copy it
    layers = _layers(leaf, num_layers, dtype if is_kernel else None, is_int8=is_matrix)
    if consume:
        _delete(leaf)
    return layers


@functools.partial(jax.jit, static_argnames=("num_layers", "dtype", "is_int8"))
def _layers(
    leaf: Array | list[Array], num_layers: int, dtype: jnp.dtype | None, *, is_int8: bool
) -> list[Any]:
    layers = as_list(leaf, num_layers)
    if is_int8:
        return [quantize(layer) for layer in layers]
    return layers if dtype is None else [layer.astype(dtype) for layer in layers]


def _delete(tree: PyTree) -> None:
    for leaf in jax.tree.leaves(tree):
        leaf.delete()


def _join(tree: Mapping[str, Any], paths: Sequence[str], *, consume: bool) -> dict[str, Any]:
    """The tree with the layers at these paths, which have the same parent, as one layer."""
    first, *rest = paths[0].split("/", 1)
    if rest:
        inner = [path.split("/", 1)[1] for path in paths]
        return {**tree, first: _join(tree[first], inner, consume=consume)}
    layers = [tree[name] for name in paths]
    joined = _concatenate(layers)
    if consume:
        _delete(layers)
    others = {name: value for name, value in tree.items() if name not in paths}
    return {**others, joined_name(paths): joined}


@jax.jit
def _concatenate(layers: list[dict[str, Any]]) -> dict[str, Any]:
    kernels = [layer["kernel"] for layer in layers]
    # The last axis is that of output features, for the scales of 8-bit kernels too.
    joined = {"kernel": jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=-1), *kernels)}
    if any("bias" in layer for layer in layers):
        zeros = [jnp.zeros(kernel.shape[1:], jnp.float32) for kernel in kernels]
        biases = [layer.get("bias", zero) for layer, zero in zip(layers, zeros, strict=True)]
        joined["bias"] = jnp.concatenate(biases)
    return joined


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


_quantize = jax.jit(quantize)


def is_prepared(variables: Any) -> bool:
    """Whether variables are the result of `prepare_params`."""
    stack = variables["params"]["stack"] if "stack" in variables.get("params", {}) else {}
    return any(isinstance(layers, list) for layers in stack.values())
