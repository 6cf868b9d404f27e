"""Conversion of parameters from and to named tensors, by the rules of `names`."""

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from xlstm_jax import sharding
from xlstm_jax.convert.layouts import LAYOUTS, Layout, Shape
from xlstm_jax.convert.names import Rule
from xlstm_jax.convert.tensors import Source, WeightsError
from xlstm_jax.modules.config import LMConfig
from xlstm_jax.modules.lm import param_shapes
from xlstm_jax.typing import PyTree

_ALIGNMENT = 64  # bytes; what JAX on a CPU needs to use a NumPy buffer without a copy


class WeightTarget(NamedTuple):
    """The parameter, or layer of a stacked parameter, that a PyTorch tensor maps to."""

    path: str
    layer: int | None  # index on the leading axis `layers`; None if there is no such axis
    shape: tuple[int, ...]  # ours, without the axis `layers`
    layout: Layout

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """Shape of the PyTorch tensor."""
        return self.layout.torch_shape(self.shape)


def parameters(cfg: LMConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Path -> shape and dtype of every parameter of a model, without computing them."""
    return by_path(param_shapes(cfg))


def by_path(tree: PyTree) -> dict[str, Any]:
    """Flattens a tree into a dict from paths to leaves."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {sharding.path_name(path): leaf for path, leaf in leaves}


def targets(
    cfg: LMConfig, rules: Sequence[Rule], leaves: Mapping[str, Any]
) -> dict[str, WeightTarget]:
    """PyTorch name -> target in our tree, for all `leaves` (path -> parameter or its shape).

    Raises:
        WeightsError: the other implementation lacks a parameter.
    """
    rule_of = {rule.path: rule for rule in rules}
    unmatched = [path for path in leaves if path not in rule_of]
    if unmatched:
        raise WeightsError(
            f"the other implementation has no parameter for {', '.join(unmatched)}; "
            "turn off the option that creates it."
        )
    table = {}
    for path, leaf in leaves.items():
        rule, layout = rule_of[path], LAYOUTS[rule_of[path].layout]
        if not path.startswith("stack/"):
            table[rule.torch_name] = WeightTarget(path, None, leaf.shape, layout)
            continue
        indices = [n for n, letter in enumerate(cfg.pattern) if letter == path.split("/")[1]]
        for layer, index in enumerate(indices):
            target = WeightTarget(path, layer, leaf.shape[1:], layout)
            table[rule.torch_name.format(index)] = target
    return table


def load(
    cfg: LMConfig, rules: Sequence[Rule], source: Source, without: Sequence[str] = ()
) -> PyTree:
    """Loads the parameters of a model from a source, sharded over the active mesh if there is one.

    Leaves are assembled one at a time, and tensors read one at a time, to bound host memory.
    Parameters whose path is in `without` are skipped.

    Raises:
        WeightsError: tensors are missing, unexpected or misshapen; lists all of them.
    """
    leaves = {path: leaf for path, leaf in parameters(cfg).items() if path not in without}
    table = targets(cfg, rules, leaves)
    _check_shapes(
        "tensors",
        {name: target.torch_shape for name, target in table.items()},
        source.shapes,
        "check that the config belongs to the weights",
        {name: f" (our {target.path})" for name, target in table.items()},
    )
    tree: dict[str, Any] = {}
    # `targets` lists the layers of a leaf one after another, so that groupby collects them.
    for path, tensors in itertools.groupby(table.items(), lambda item: item[1].path):
        host = _empty(leaves[path].shape, leaves[path].dtype)
        for name, target in tensors:
            part = host if target.layer is None else host[target.layer]
            # Assignment casts to the dtype of the parameter, float32.
            part[...] = target.layout.from_torch(source.read(name), target.shape)
        *folders, last = path.split("/")
        functools.reduce(lambda node, key: node.setdefault(key, {}), folders, tree)[last] = _put(
            path, host
        )
    return tree


def export(
    cfg: LMConfig, rules: Sequence[Rule], params: PyTree
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the PyTorch name and array of every tensor, one at a time to bound host memory."""
    leaves = by_path(params)
    for name, target in targets(cfg, rules, leaves).items():
        leaf = leaves[target.path]
        part = leaf if target.layer is None else leaf[target.layer]
        yield name, np.ascontiguousarray(target.layout.to_torch(np.asarray(part)))


def check_params(cfg: LMConfig, params: PyTree) -> None:
    """Raises WeightsError, listing all differences, unless `params` match the config."""
    expected = {path: leaf.shape for path, leaf in parameters(cfg).items()}
    actual = {path: np.shape(leaf) for path, leaf in by_path(params).items()}
    if set(actual) == {f"params/{path}" for path in expected}:
        raise WeightsError(
            "params must not contain the collection 'params'; pass variables['params']."
        )
    _check_shapes("params", expected, actual, "pass the config that they were made with", {})


def _check_shapes(
    what: str,
    expected: Mapping[str, Shape],
    actual: Mapping[str, Shape],
    way_out: str,
    remarks: Mapping[str, str],
) -> None:
    """Raises WeightsError listing all missing, unexpected and misshapen arrays."""
    problems = [
        f"{name} {shape} is missing{remarks.get(name, '')}"
        for name, shape in expected.items()
        if name not in actual
    ]
    problems += [f"{name} {actual[name]} is unexpected" for name in actual if name not in expected]
    problems += [
        f"{name} must have the shape {shape}, got {actual[name]}{remarks.get(name, '')}"
        for name, shape in expected.items()
        if actual.get(name, shape) != shape
    ]
    if problems:
        raise WeightsError(f"{what} do not match the config: {'; '.join(problems)}; {way_out}.")


def _empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An aligned array, which JAX on a CPU uses without a copy."""
    size = np.dtype(dtype).itemsize * int(np.prod(shape))
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _put(path: str, host: np.ndarray) -> jax.Array:
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return jnp.asarray(host)
    rules = sharding.get_rules("fsdp_tensor")  # a mesh axis of size 1 has no effect
    return jax.device_put(host, sharding.sharding_of(path, host.shape, rules, mesh))
