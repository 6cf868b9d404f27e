"""Parameters of a model from tensors under other names, and back, by the rules of `names`."""

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

_ALIGNMENT = 64  # bytes


class WeightTarget(NamedTuple):
    """The parameter, or the layer of one, that a tensor of another implementation becomes."""

    path: str
    layer: int | None  # index on the leading axis `layers`; None where there is no such axis
    shape: tuple[int, ...]  # ours, of this tensor alone
    layout: Layout

    @property
    def their_shape(self) -> tuple[int, ...]:
        return self.layout.their_shape(self.shape)


def parameters(cfg: LMConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """Path -> shape and dtype of every parameter of a model; nothing is computed."""
    return by_path(param_shapes(cfg))


def by_path(tree: PyTree) -> dict[str, Any]:
    """Path -> leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {sharding.path_name(path): leaf for path, leaf in leaves}


def targets(
    cfg: LMConfig, rules: Sequence[Rule], leaves: Mapping[str, Any]
) -> dict[str, WeightTarget]:
    """Their name -> the target in our tree, for all `leaves`: path -> parameter, or its shape.

    Raises:
        WeightsError: the other implementation has no name for a parameter.
    """
    rule_of = {rule.ours: rule for rule in rules}
    nameless = [path for path in leaves if path not in rule_of]
    if nameless:
        raise WeightsError(
            f"the other implementation has no parameter for {', '.join(nameless)}; "
            "turn off the option that makes it."
        )
    table = {}
    for path, leaf in leaves.items():
        rule, layout = rule_of[path], LAYOUTS[rule_of[path].layout]
        if not path.startswith("stack/"):
            table[rule.theirs] = WeightTarget(path, None, leaf.shape, layout)
            continue
        numbers = [n for n, letter in enumerate(cfg.pattern) if letter == path.split("/")[1]]
        for layer, number in enumerate(numbers):
            target = WeightTarget(path, layer, leaf.shape[1:], layout)
            table[rule.theirs.format(number)] = target
    return table


def load(
    cfg: LMConfig, rules: Sequence[Rule], source: Source, without: Sequence[str] = ()
) -> PyTree:
    """Parameters of a model, from a source; on the active mesh where there is one.

    Leaf by leaf, and tensor by tensor in each: on the host there is never more than one leaf.
    Parameters whose path is in `without` are left out.

    Raises:
        WeightsError: tensors are missing, too many or of another shape; all are listed.
    """
    leaves = {path: leaf for path, leaf in parameters(cfg).items() if path not in without}
    table = targets(cfg, rules, leaves)
    _check_shapes(
        "tensors",
        {name: target.their_shape for name, target in table.items()},
        source.shapes,
        "check that config and weights belong together",
        {name: f" ({target.path} here)" for name, target in table.items()},
    )
    tree: dict[str, Any] = {}
    for path, tensors in itertools.groupby(table.items(), lambda item: item[1].path):
        host = _empty(leaves[path].shape, leaves[path].dtype)
        for name, target in tensors:
            part = host if target.layer is None else host[target.layer]
            part[...] = target.layout.to_ours(source.read(name), target.shape)
        *folders, last = path.split("/")
        functools.reduce(lambda node, key: node.setdefault(key, {}), folders, tree)[last] = _put(
            path, host
        )
    return tree


def store(cfg: LMConfig, rules: Sequence[Rule], params: PyTree) -> Iterator[tuple[str, np.ndarray]]:
    """Their names and arrays, one at a time."""
    leaves = by_path(params)
    for name, target in targets(cfg, rules, leaves).items():
        leaf = leaves[target.path]
        part = leaf if target.layer is None else leaf[target.layer]
        yield name, np.ascontiguousarray(target.layout.to_theirs(np.asarray(part)))


def check_params(cfg: LMConfig, params: PyTree) -> None:
    """Raises WeightsError, with all that is wrong, unless these are the parameters of the model."""
    expected = {path: leaf.shape for path, leaf in parameters(cfg).items()}
    actual = {path: np.shape(leaf) for path, leaf in by_path(params).items()}
    if set(actual) == {f"params/{path}" for path in expected}:
        raise WeightsError("params must be the parameters alone; give variables['params'].")
    _check_shapes("params", expected, actual, "give the config that they were made with", {})


def _check_shapes(
    what: str,
    expected: Mapping[str, Shape],
    actual: Mapping[str, Shape],
    way_out: str,
    remarks: Mapping[str, str],
) -> None:
    """Raises WeightsError with all that is missing, surplus, or of another shape."""
    problems = [
        f"{name} {shape} is missing{remarks.get(name, '')}"
        for name, shape in expected.items()
        if name not in actual
    ]
    problems += [f"{name} {actual[name]} is not known" for name in actual if name not in expected]
    problems += [
        f"{name} must have the shape {shape}, got {actual[name]}{remarks.get(name, '')}"
        for name, shape in expected.items()
        if actual.get(name, shape) != shape
    ]
    if problems:
        raise WeightsError(f"{what} do not fit the config: {'; '.join(problems)}; {way_out}.")


def _empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array that begins where JAX on a CPU takes it as it is, instead of copying it."""
    size = np.dtype(dtype).itemsize * int(np.prod(shape))
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _put(path: str, host: np.ndarray) -> jax.Array:
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return jnp.asarray(host)
    rules = sharding.get_rules("fsdp_tensor")  # where an axis of the mesh is 1, it cuts nothing
    return jax.device_put(host, sharding.sharding_of(path, host.shape, rules, mesh))
