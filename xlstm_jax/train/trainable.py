"""Which parameters are trained: all, those that `train.freeze` does not match, or LoRA adapters.

Gradients, optimizer state, weight decay, norms and the guard concern the trained parameters only.
"""

import difflib
import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax

from xlstm_jax.config import ConfigError
from xlstm_jax.errors import quote
from xlstm_jax.sharding.axes import path_name
from xlstm_jax.typing import PyTree

ADAPTERS = "lora"
"""Key of the adapters in the parameters of a train state; with them, nothing else is trained."""


def partition(params: PyTree, freeze: str | None = None) -> tuple[PyTree, PyTree]:
    """The trained and the frozen parameters: two trees, each with None for the leaves of the other.

    Args:
        freeze: regular expression; parameters with a match in their path are frozen. Unused for
            parameters with adapters.

    Raises:
        ConfigError: `freeze` matches no parameter, or all of them.
    """
    if not has_adapters(params) and freeze is None:
        return params, jax.tree.map(lambda _: None, params)
    paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    if has_adapters(params):
        trained = {path for path in paths if path.startswith(f"{ADAPTERS}/")}
    else:
        assert freeze is not None
        trained = {path for path in paths if not re.search(freeze, path)}
        if len(trained) == len(paths):
            raise ConfigError(
                f"train.freeze={quote(freeze)} must match the path of a parameter, got no match; "
                f"{nearest(freeze, paths)}"
            )
        if not trained:
            raise ConfigError(
                f"train.freeze={quote(freeze)} must leave a parameter to train, but matches all "
                f"{len(paths)} paths; {nearest(freeze, paths)}"
            )

    def select(path: Any, leaf: Any, *, of_trained: bool) -> Any:
        return leaf if (path_name(path) in trained) == of_trained else None

    tree_map = jax.tree_util.tree_map_with_path
    chosen, rest = (
        tree_map(functools.partial(select, of_trained=flag), params) for flag in (True, False)
    )
    return chosen, rest


def has_adapters(params: PyTree) -> bool:
    """Whether the parameters of a train state include adapters."""
    return isinstance(params, Mapping) and ADAPTERS in params


def combine(trained: PyTree, frozen: PyTree) -> PyTree:
    """The inverse of `partition`."""
    return jax.tree.map(
        lambda x, y: y if x is None else x, trained, frozen, is_leaf=lambda x: x is None
    )


def nearest(pattern: str, paths: Iterable[str]) -> str:
    """A hint for an error: the paths that are most similar to a pattern."""
    words = re.findall(r"\w+", pattern)

    def similarity(path: str) -> float:
        parts = path.split("/")
        return sum(
            max(difflib.SequenceMatcher(None, word, part).ratio() for part in parts)
            for word in words
        )

    listed = sorted(paths, key=similarity, reverse=True)[:3]
    return f"the nearest paths are {', '.join(listed)}."


def num_bytes(tree: PyTree) -> int:
    """Bytes of all leaves, over all devices."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
