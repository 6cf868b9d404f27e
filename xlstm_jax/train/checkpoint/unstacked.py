"""Restores the parameters of a run layer by layer, without a second copy of all of them."""

from pathlib import Path
from typing import Any

import jax

from xlstm_jax.modules.lm import param_shapes
from xlstm_jax.modules.loops import as_list
from xlstm_jax.train.checkpoint.load import abstract, load_items
from xlstm_jax.train.checkpoint.restore import config_and_step, like_average, restore_params
from xlstm_jax.train.config import ExperimentConfig
from xlstm_jax.typing import PyTree


def restore_unstacked(
    run_dir: str | Path, step: int | None = None, *, ema: bool = False
) -> tuple[ExperimentConfig, PyTree]:
    """As `restore_params` onto one device, with a list of layers for each letter of the pattern.

    Stacked parameters are read and divided one at a time, the largest first. Those to evaluate may
    have to be computed from several (with adapters, frozen ones or a schedule-free optimizer);
    these are restored stacked.
    """
    cfg, step = config_and_step(run_dir, step)
    if cfg.lora.rank or cfg.train.freeze or (ema and not cfg.train.ema_decay):
        return restore_params(run_dir, step, ema=ema)
    shapes, params, is_averaged = abstract(param_shapes(cfg.model)), {}, False
    field = "ema" if ema else "params"

    def like(stored: PyTree, path: Any, leaf: jax.ShapeDtypeStruct) -> PyTree:
        nonlocal is_averaged
        is_averaged = not ema and like_average(stored.get("opt_state"), None, None) is not None
        return {field: _put({}, path, leaf)}

    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    for path, leaf in sorted(leaves, key=lambda entry: -entry[1].size):
        items = {"state": lambda stored, path=path, leaf=leaf: like(stored, path, leaf)}
        is_first = not params
        loaded = load_items(Path(run_dir), step, items, partial=True, is_verified=not is_first)
        if is_averaged:
            return restore_params(run_dir, step)
        (value,) = jax.tree.leaves(loaded)
        _put(params, path, _layers(cfg.model.pattern, path, value))
    stack = {
        letter: _transposed(shapes["stack"][letter], params["stack"][letter])
        for letter in params["stack"]
    }
    return cfg, {**params, "stack": stack}


def _layers(pattern: str, path: Any, leaf: jax.Array) -> Any:
    """The layers of a stacked parameter, which is deleted; others as they are."""
    if path[0].key != "stack":
        return leaf
    layers = jax.block_until_ready(as_list(leaf, pattern.count(path[1].key)))
    leaf.delete()
    return layers


def _transposed(like: PyTree, lists: PyTree) -> list[PyTree]:
    """A list of trees, of a tree of lists."""
    structure = jax.tree.structure(like)
    layers = zip(*structure.flatten_up_to(lists), strict=True)
    return [structure.unflatten(layer) for layer in layers]


def _put(tree: dict[str, Any], path: Any, value: Any) -> dict[str, Any]:
    """The tree with a value at a path of keys of dicts, which are created."""
    *parents, last = (entry.key for entry in path)
    inner = tree
    for name in parents:
        inner = inner.setdefault(name, {})
    inner[last] = value
    return tree
