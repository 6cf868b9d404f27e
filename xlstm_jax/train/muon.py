"""Muon: momentum with each matrix orthogonalized separately."""

import jax
import optax

from xlstm_jax.errors import ConfigError
from xlstm_jax.modules.kinds import Matrices, matrices_of
from xlstm_jax.sharding.axes import path_name
from xlstm_jax.train.config import TrainConfig
from xlstm_jax.typing import PyTree

_RMS = 0.2  # of the entries of an update, as usual for Adam, so that one rate serves both


def scale_by_muon(cfg: TrainConfig) -> optax.GradientTransformation:
    """Muon for the parameters that are matrices, Adam with Nesterov momentum for the others.

    The table of `BlockKind.matrices` says which matrices a parameter consists of. Layers, heads and
    concatenated matrices are orthogonalized separately. The state has the shapes of the parameters
    and is sharded like them.

    Sources: Jordan 2024, kellerjordan.github.io/posts/muon; the scale of updates, Liu et al. 2025,
    arXiv:2502.16982.
    """
    muon = optax.contrib.muon(
        -1.0,  # cancels its sign: the learning rate comes later
        beta=cfg.momentum,
        eps=cfg.eps,
        adam_b1=cfg.b1,
        adam_b2=cfg.b2,
        muon_weight_dimension_numbers=_dimension_numbers,
        consistent_rms=_RMS,
    )

    def update(updates, state, params=None):
        new, new_state = muon.update(_split(updates), _split(state), _split(params))
        return _join(new, updates), _join(new_state, state)

    return optax.GradientTransformation(muon.init, update)


def _dimension_numbers(params: PyTree) -> PyTree:
    """The input and output axes of every parameter that is orthogonalized, else None."""

    def of_leaf(path, _):
        matrices = _matrices(path_name(path))
        if matrices is None:
            return None
        axes = _axes(matrices)
        # Counted from the end, so that leading layers are one more axis of separate matrices.
        return optax.contrib.MuonDimensionNumbers(
            *(axes.index(letter) - len(axes) for letter in "io")
        )

    return jax.tree.map_with_path(of_leaf, params)


def _axes(matrices: Matrices) -> str:
    """The axes of a parameter after `_split`."""
    return matrices.axes if matrices.parts == 1 else matrices.axes[:-1] + "bo"


def _split(tree: PyTree) -> PyTree:
    """Gives concatenated matrices an axis of their own; states have the paths of parameters."""

    def split(path, x):
        matrices = _matrices(path_name(path)) if x.ndim > 1 else None
        if matrices is None or matrices.parts == 1:
            return x
        return x.reshape(*x.shape[:-1], matrices.parts, -1)

    return jax.tree.map_with_path(split, tree)


def _join(tree: PyTree, like: PyTree) -> PyTree:
    """Undoes `_split`."""
    return jax.tree.map(lambda x, original: x.reshape(original.shape), tree, like)


def _matrices(path: str) -> Matrices | None:
    try:
        return matrices_of(path)
    except KeyError:
        raise ConfigError(
            f"train.optimizer='muon' must know of which matrices {path} consists; add it to "
            "`matrices` of its block kind, or use another optimizer."
        ) from None
