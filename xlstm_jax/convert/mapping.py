"""Conversion of parameters from and to named tensors, by the rules of `names`."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from xlstm_jax import sharding
from xlstm_jax.convert import shards
from xlstm_jax.convert.fields import first_of
from xlstm_jax.convert.joined import Joined, separate, stored_tensors
from xlstm_jax.convert.layouts import LAYOUTS, Layout, Shape
from xlstm_jax.convert.names import Rule
from xlstm_jax.convert.tensors import (
    Source,
    WeightsError,
    is_finite,
    is_in_block,
    warn_not_finite,
)
from xlstm_jax.errors import quote
from xlstm_jax.modules.config import LMConfig
from xlstm_jax.modules.lm import param_shapes
from xlstm_jax.typing import PyTree


class WeightTarget(NamedTuple):
    """The parameter, or layer of a stacked parameter, that a PyTorch tensor maps to."""

    path: str
    layer: int | None  # index on the leading axis `layers`; None without that axis
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
            f"the other implementation has no parameter for {first_of(unmatched, 3)}; "
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
    cfg: LMConfig,
    rules: Sequence[Rule],
    source: Source,
    without: Sequence[str] = (),
    joined: Sequence[Joined] = (),
    *,
    unstacked: bool = False,
) -> PyTree:
    """Loads the parameters of a model from a source, sharded over the active mesh, if any.

    Leaves are assembled one at a time, and tensors read one at a time: host memory is that of the
    shards of one leaf and of one tensor, besides the parameters of a CPU.
    Parameters whose path is in `without` are skipped, and those of modules that are `joined` in the
    source are taken apart. `unstacked` returns a list of the layers of each letter, as
    `generate.prepare_params` needs them; on a mesh it has no effect. Warns if a value is NaN or
    infinite.

    Raises:
        WeightsError: tensors are missing, unexpected or misshapen; names the first of them.
    """
    leaves = {path: leaf for path, leaf in parameters(cfg).items() if path not in without}
    table = targets(cfg, rules, leaves)
    stored = stored_tensors(
        {name: target.torch_shape for name, target in table.items()}, joined, cfg.num_blocks
    )
    check_shapes(
        "tensors",
        {name: tensor.shape for name, tensor in stored.items()},
        source.shapes,
        "check that the config belongs to the weights",
        {n: f" (our {', '.join(table[p].path for p in t.parts)})" for n, t in stored.items()},
    )
    source = separate(source, stored)
    owner = {part: name for name, tensor in stored.items() for part in tensor.parts}
    tree: dict[str, Any] = {}
    not_finite: dict[str, None] = {}  # an ordered set
    layers: dict[str, dict[str, WeightTarget]] = {}
    for name, target in table.items():
        layers.setdefault(target.path, {})[name] = target
    # The largest first, so that its read buffer is needed while little of the model is in memory.
    unstacked = unstacked and jax.sharding.get_mesh().empty
    for path in sorted(leaves, key=lambda path: -math.prod(leaves[path].shape)):
        for where, leaf, tensors in _parts(path, leaves[path], layers[path], unstacked=unstacked):
            array, invalid = _load_leaf(path, leaf, tensors, source)
            not_finite |= dict.fromkeys(owner[name] for name in invalid)
            *folders, last = where
            node = functools.reduce(lambda node, key: node.setdefault(key, {}), folders, tree)
            node[last] = array
    warn_not_finite(list(not_finite))
    if unstacked:
        stack = tree.get("stack", {})
        tree |= {"stack": {letter: [by[n] for n in sorted(by)] for letter, by in stack.items()}}
    return tree


def _parts(
    path: str,
    leaf: jax.ShapeDtypeStruct,
    layers: Mapping[str, WeightTarget],
    *,
    unstacked: bool,
) -> Iterator[tuple[list[Any], jax.ShapeDtypeStruct, Mapping[str, WeightTarget]]]:
    """Where in the tree a parameter or each of its layers is, its shape, and its tensors."""
    names: list[Any] = path.split("/")
    if not unstacked or names[0] != "stack":
        yield names, leaf, layers
        return
    for name, target in layers.items():
        where = [*names[:2], target.layer, *names[2:]]
        one = {name: target._replace(layer=None)}
        yield where, leaf.update(shape=leaf.shape[1:]), one


def _load_leaf(
    path: str, leaf: jax.ShapeDtypeStruct, layers: Mapping[str, WeightTarget], source: Source
) -> tuple[jax.Array, list[str]]:
    """A parameter, from the tensors of its layers, and the names of those that are not finite."""
    # In a separate function, so that this memory is free before the next parameter is read.
    parameter, not_finite = shards.allocate(path, leaf), []
    for name, target in layers.items():
        parts = list(parameter.parts(target.layer))
        if not parts:  # other processes have this layer
            continue
        value = target.layout.from_torch(source.read(name), target.shape)
        for index, part in parts:
            # Assignment casts to the dtype of the parameter, float32; float64 may overflow.
            with np.errstate(over="ignore"):
                part[...] = value[index]
        del value  # before the next tensor is read
        if not all(is_finite(part) for _, part in parts):
            not_finite.append(name)
    return parameter.to_devices(), not_finite


def export(
    cfg: LMConfig, rules: Sequence[Rule], params: PyTree, joined: Sequence[Joined] = ()
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the PyTorch name and array of every tensor, one at a time to bound host memory.

    Warns after the last one if a value is NaN or infinite.
    """
    leaves, not_finite = by_path(params), []
    table = targets(cfg, rules, leaves)

    def array_of(name: str) -> np.ndarray:
        path, layer, _, layout = table[name]
        return layout.to_torch(np.asarray(leaves[path] if layer is None else leaves[path][layer]))

    shapes = {name: target.torch_shape for name, target in table.items()}
    for name, tensor in stored_tensors(shapes, joined, cfg.num_blocks).items():
        array = tensor.join([array_of(part) for part in tensor.parts])
        if not is_finite(array):
            not_finite.append(name)
        yield name, np.ascontiguousarray(array)
    warn_not_finite(not_finite)


def check_params(cfg: LMConfig, params: PyTree) -> None:
    """Raises WeightsError, naming the first differences, unless `params` match the config."""
    expected = {path: leaf.shape for path, leaf in parameters(cfg).items()}
    actual = {path: np.shape(leaf) for path, leaf in by_path(params).items()}
    if set(actual) == {f"params/{path}" for path in expected}:
        raise WeightsError(
            "params must not contain the collection 'params'; pass variables['params']."
        )
    check_shapes("params", expected, actual, "pass the config that they were made with", {})


def check_shapes(
    what: str,
    expected: Mapping[str, Shape],
    actual: Mapping[str, Shape],
    way_out: str,
    remarks: Mapping[str, str],
) -> None:
    """Raises WeightsError if arrays are missing, unexpected or misshapen; names the first ones."""
    # Arrays outside of the blocks first: they are few, and tell models apart.
    missing = sorted((n for n in expected if n not in actual), key=is_in_block)
    unexpected = [name for name in actual if name not in expected]
    misshapen = [n for n, shape in expected.items() if actual.get(n, shape) != shape]
    # With many problems, the remarks would make the message too long to read.
    if len(missing) + len(unexpected) + len(misshapen) > 4:
        remarks = {}

    def describe(name: str) -> str:
        shape, remark = expected.get(name), remarks.get(name, "")
        if shape is None:
            return f"{quote(name)[1:-1]} {quote(actual[name])} is unexpected"
        if name not in actual:
            return f"{name} {shape} is missing{remark}"
        return f"{name} must have the shape {shape}, got {quote(actual[name])}{remark}"

    problems = [
        *_first(missing, 3, describe),
        *_first(unexpected, 2 if missing else 3, describe),
        *_first(misshapen, 1 if missing or unexpected else 3, describe),
    ]
    if problems:
        raise WeightsError(f"{what} do not match the config: {'; '.join(problems)}; {way_out}.")


def _first(names: Sequence[str], count: int, describe: Callable[[str], str]) -> list[str]:
    """Descriptions of the first names, the last one with the number of others."""
    lines = [describe(name) for name in names[:count]]
    more = [f"{lines[-1]} and {len(names) - count} more"] if len(names) > count else lines[-1:]
    return [*lines[:-1], *more]
