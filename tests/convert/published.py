"""Shared by tests of published models: tolerances; conversion of configs, states and parameters."""

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
"""Largest allowed error, relative to the largest value of an array."""

# The sequence form of the reference has no initial m; this value makes ours negligible.
NO_INITIAL_M = -1e30


def nested(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a golden file, nested as in the package `xlstm`."""
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
    """Converts all leaves to `dtype`."""
    return jax.tree.map(lambda a: jnp.asarray(np.asarray(a), dtype), tree)


def without_initial_m(state: Any) -> Any:
    """The initial state of mLSTM blocks, or of one layer, with an m that has no effect."""
    if isinstance(state, dict):
        return {k: without_initial_m(s) if k == "m" else s for k, s in state.items()}
    return state._replace(cell=state.cell._replace(m=jnp.full_like(state.cell.m, NO_INITIAL_M)))


def part_params(
    cfg: LMConfig, tensors: Mapping[str, np.ndarray], torch_prefix: str, path_prefix: str
) -> Any:
    """Parameters below `path_prefix`, from tensors named relative to `torch_prefix` of block 0."""
    prefix = names.V1_STACK + "blocks.0." + torch_prefix
    arrays = from_arrays({prefix + name: array for name, array in tensors.items()})
    without = [path for path in mapping.parameters(cfg) if not path.startswith(path_prefix)]
    tree = mapping.load(cfg, names.V1, arrays, without)
    for key in path_prefix.strip("/").split("/"):
        tree = tree[key]
    return jax.tree.map(lambda leaf: leaf[0], tree)


def part_tensors(
    cfg: LMConfig, params: Any, torch_prefix: str, path_prefix: str
) -> dict[str, np.ndarray]:
    """The inverse of `part_params`."""
    tree = jax.tree.map(lambda leaf: leaf[None], params)
    for key in reversed(path_prefix.strip("/").split("/")):
        tree = {key: tree}
    prefix = names.V1_STACK + "blocks.0." + torch_prefix
    return {name.removeprefix(prefix): array for name, array in mapping.export(cfg, names.V1, tree)}


def assert_same_mlstm_state(actual: MLSTMState, c, n, m, tolerance: float) -> None:
    """Compares C e^m and n e^m, which do not depend on the choice of the stabilizer m.

    `c`, `n`, `m` are those of the reference, with leading axes B and H.
    """
    m = np.asarray(m, np.float64).reshape(np.shape(actual.m))
    n = np.asarray(n).reshape(np.shape(actual.n))
    # Relative to the larger stabilizer, so that neither side overflows.
    max_m = np.maximum(m, actual.m)
    scale = np.exp(np.asarray(actual.m, np.float64) - max_m)
    reference_scale = np.exp(m - max_m)
    for name, a, b in (("C", actual.C, np.asarray(c)), ("n", actual.n, n)):
        axes = (...,) + (None,) * (a.ndim - scale.ndim)
        golden_files.assert_matches(
            np.asarray(a, np.float64) * scale[axes], b * reference_scale[axes], tolerance, name
        )


def assert_same_layer_state(
    actual: Any, expected: Mapping[str, np.ndarray], tolerance: float
) -> None:
    """Compares the state of a first-generation layer with that of the reference."""
    if "conv_state" in expected:  # the reference also stores the current input
        golden_files.assert_matches(actual.conv, expected["conv_state"][:, 1:], tolerance, "conv")
    if "slstm_state" in expected:
        cell = slstm_state(expected["slstm_state"], actual.cell.c.shape[1])
        for field, leaf in cell._asdict().items():
            golden_files.assert_matches(getattr(actual.cell, field), leaf, tolerance, field)
        return
    root = np.sqrt(actual.cell.C.shape[-2])  # the reference stores keys divided by it
    c, n, m = (expected[f"mlstm_state/{leaf}"] for leaf in "cnm")
    assert_same_mlstm_state(actual.cell, c * root, n * root, m, tolerance)


def slstm_state(array: np.ndarray, num_heads: int) -> SLSTMState:
    """Our state from the array (4, B, H K) of the reference, in the order h, c, n, m."""
    h, c, n, m = array.reshape(4, array.shape[1], num_heads, -1)
    return SLSTMState(c=c, n=n, h=h, m=m)


def mean_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean over the positions whose label is not -1."""
    log_probs = jax.nn.log_softmax(logits)
    indices = jnp.maximum(labels, 0)[..., None]
    target_log_probs = jnp.take_along_axis(log_probs, indices, axis=-1)[..., 0]
    return -jnp.sum(jnp.where(labels >= 0, target_log_probs, 0)) / jnp.sum(labels >= 0)
