"""Reads items of a checkpoint after checking it."""

import errno
import os
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint.experimental.v1 as ocp

from xlstm_jax.errors import quote_path
from xlstm_jax.train import manifest
from xlstm_jax.train.checkpoint.files import (
    FOLDER,
    CheckpointError,
    os_error_number,
    steps,
    store_context,
)
from xlstm_jax.typing import PyTree


def load_items(
    run_dir: Path,
    step: int,
    items: dict[str, Any],
    *,
    partial: bool = False,
    is_verified: bool = False,
) -> dict[str, Any]:
    """Restores items of a checkpoint.

    Args:
        partial: read only the given leaves of a state, which may be a function of the stored one.
        is_verified: the checksums were compared by an earlier call.
    """
    folder = run_dir.resolve() / FOLDER / str(step)
    if (version := manifest.read_format(folder)) > manifest.FORMAT:
        raise CheckpointError(
            f"{quote_path(folder)} must have a format up to {manifest.FORMAT}, got {version}, "
            "which a newer version of xlstm-jax writes; upgrade xlstm-jax."
        )
    earlier = [other for other in steps(run_dir) if other < step]
    way_out = "it is the only one, so start again with fresh=True (--fresh)"
    if earlier:
        way_out = f"delete {run_dir / FOLDER / str(step)} to resume from step {earlier[-1]}"
    problem = None if is_verified else manifest.verify(folder)
    if problem is not None:
        raise CheckpointError(f"{problem}; {way_out}.")
    context = store_context()
    context.pytree.loading.partial_load = partial
    try:
        with context:
            difference = None
            if "state" in items:
                stored = ocp.metadata(str(folder), checkpointable_name="state").metadata
                if callable(items["state"]):
                    items = items | {"state": items["state"](stored)}
                difference = _mismatch(stored, items["state"], partial=partial)
            if difference is None:
                return ocp.load_checkpointables(str(folder), items)
    # The array store raises many types of exception, including a bare Exception.
    except Exception as error:
        if (number := os_error_number(error)) not in (None, errno.ENOENT):
            raise OSError(number, os.strerror(number), str(folder)) from error
        raise CheckpointError(
            f"{folder} must be a complete checkpoint, but it cannot be read "
            f"({_innermost(error)}); {way_out}."
        ) from error
    raise CheckpointError(
        f"{folder} must be a checkpoint of this config, but {difference}; use the config that it "
        "was trained with, or another directory."
    )


def _innermost(error: BaseException) -> str:
    """The first line of the error that caused all others."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().split("\n")[0][:200] or type(error).__name__


def _mismatch(stored_tree: PyTree, like: PyTree, *, partial: bool) -> str | None:
    """Describes the first leaf that a stored state lacks, has in excess or in another shape."""

    def shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(p, simple=True, separator="/"): x.shape for p, x in leaves}

    wanted, stored = shapes(like), shapes(stored_tree)
    for name in wanted if partial else {**wanted, **stored}:
        ours, other = wanted.get(name, "absent"), stored.get(name, "absent")
        if ours != other:
            return f"{name} is {other} in the checkpoint and {ours} in the config"
    return None


def abstract(tree: PyTree, shardings: PyTree = None) -> PyTree:
    """Shapes of a tree with `shardings`, or else with its own, or else on one device."""
    one_device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = shardings or jax.tree.map(
        lambda x: getattr(x, "sharding", None) or one_device, tree
    )
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        tree,
        shardings,
    )
