"""What the tests of published models share: tolerances, states and configs as the references have
them, and parts of a model read by the rules for whole ones."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests import golden_files
from xlstm_jax.cells import MLSTMState, SLSTMState
from xlstm_jax.convert import mapping, names
from xlstm_jax.convert.tensors import from_arrays
from xlstm_jax.modules import LMConfig

VALUES = {"float32": 2e-5, "float64": 1e-10}
GRADIENTS = {"float32": 2e-4, "float64": 1e-10}
"""Largest error allowed, as a share of an array's largest value."""

# Where the reference's sequence form has no initial m at all, ours has one that never counts.
NO_SCALE = -1e30


def nested(config: Mapping[str, Any]) -> dict[str, Any]:
    """A golden file's config with its parts where the package `xlstm` has them."""
    config = {k: v for k, v in config.items() if "weight_decay_params" not in k}
    parts = {part: config.pop(part, {}) for part in ("mlstm", "slstm", "feedforward")}
    feedforward = dict(parts["feedforward"])
    if "round_up_to_multiple_of" in feedforward:
        multiple = feedforward.pop("round_up_to_multiple_of")
        feedforward["round_proj_up_to_multiple_of"] = multiple
    return config | {
        "mlstm_block": {"mlstm": parts["mlstm"]},
        "slstm_block": {"slstm": parts["slstm"], "feedforward": feedforward},
    }


def cast(tree: Any, dtype: str) -> Any:
    """Floating-point leaves in another type."""
    return jax.tree.map(lambda a: jnp.asarray(np.asarray(a), dtype), tree)


def without_scale(state: Any) -> Any:
    """An empty memory of first-generation mLSTM blocks, or of one layer, whose m never counts."""
    if isinstance(state, dict):
        return {k: without_scale(s) if k == "m" else s for k, s in state.items()}
    return state._replace(cell=state.cell._replace(m=jnp.full_like(state.cell.m, NO_SCALE)))


def part_params(cfg: LMConfig, tensors: Mapping[str, np.ndarray], theirs: str, ours: str) -> Any:
    """Parameters of a part of the first block: `theirs` and `ours` are where its names begin."""
    start = names.V1_STACK + "blocks.0." + theirs
    arrays = from_arrays({start + name: array for name, array in tensors.items()})
    without = [path for path in mapping.parameters(cfg) if not path.startswith(ours)]
    tree = mapping.load(cfg, names.V1, arrays, without)
    for folder in ours.strip("/").split("/"):
        tree = tree[folder]
    return jax.tree.map(lambda leaf: leaf[0], tree)


def part_tensors(cfg: LMConfig, params: Any, theirs: str, ours: str) -> dict[str, np.ndarray]:
    """The inverse of `part_params`."""
    tree = jax.tree.map(lambda leaf: leaf[None], params)
    for folder in reversed(ours.strip("/").split("/")):
        tree = {folder: tree}
    start = names.V1_STACK + "blocks.0." + theirs
    return {name.removeprefix(start): array for name, array in mapping.export(cfg, names.V1, tree)}


def assert_same_mlstm_memory(actual: MLSTMState, c, n, m, tolerance: float) -> None:
    """Same C e^m and n e^m: the scale itself is a matter of taste.

    `c`, `n`, `m` are a reference's, one head's memory per entry of their first two axes.
    """
    m = np.asarray(m, np.float64).reshape(np.shape(actual.m))
    n = np.asarray(n).reshape(np.shape(actual.n))
    # In units of the larger of both scales, so that neither overflows.
    top = np.maximum(m, actual.m)
    ours, theirs = np.exp(np.asarray(actual.m, np.float64) - top), np.exp(m - top)
    for name, a, b in (("C", actual.C, np.asarray(c)), ("n", actual.n, n)):
        axes = (...,) + (None,) * (a.ndim - ours.ndim)
        golden_files.assert_matches(
            np.asarray(a, np.float64) * ours[axes], b * theirs[axes], tolerance, name
        )


def assert_same_layer_state(actual: Any, found: Mapping[str, np.ndarray], tolerance: float) -> None:
    """The memory of a first-generation layer, against the reference's after its steps."""
    if "conv_state" in found:  # theirs holds the current input too
        golden_files.assert_matches(actual.conv, found["conv_state"][:, 1:], tolerance, "conv")
    if "slstm_state" in found:
        cell = slstm_state(found["slstm_state"], actual.cell.c.shape[1])
        for field, expected in cell._asdict().items():
            golden_files.assert_matches(getattr(actual.cell, field), expected, tolerance, field)
        return
    root = np.sqrt(actual.cell.C.shape[-2])  # their keys are divided by it when they are stored
    c, n, m = (found[f"mlstm_state/{leaf}"] for leaf in "cnm")
    assert_same_mlstm_memory(actual.cell, c * root, n * root, m, tolerance)


def slstm_state(array: np.ndarray, num_heads: int) -> SLSTMState:
    """The reference's (4, B, H K) in the order h, c, n, m."""
    h, c, n, m = array.reshape(4, array.shape[1], num_heads, -1)
    return SLSTMState(c=c, n=n, h=h, m=m)


def mean_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Over the positions whose label is not -1."""
    logs = jax.nn.log_softmax(logits)
    picked = jnp.take_along_axis(logs, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(labels >= 0, picked, 0)) / jnp.sum(labels >= 0)
