"""Restores a train state, or the parameters of a run, from its checkpoints."""

import collections
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from optax.contrib import ScheduleFreeState

from xlstm_jax.config import ConfigError, load_config
from xlstm_jax.modules.lm import param_shapes
from xlstm_jax.train.checkpoint.files import (
    FOLDER,
    PARAMS_ONLY,
    CheckpointError,
    latest_step,
    steps,
)
from xlstm_jax.train.checkpoint.load import abstract, load_items
from xlstm_jax.train.config import ExperimentConfig
from xlstm_jax.train.guard import Guard
from xlstm_jax.train.lora import adapters
from xlstm_jax.train.state import TrainState, eval_params
from xlstm_jax.train.trainable import ADAPTERS, combine, partition
from xlstm_jax.typing import PyTree

# `Guard` in older checkpoints, before it had the field `first`, and before a field was renamed.
_GUARDS = [
    collections.namedtuple("_Guard", (name, "skipped")) for name in ("ema_grad_norm", "usual_norm")
]


def has_params_only(run_dir: str | Path, at_most: int | None = None) -> bool:
    """Whether the newest checkpoint is of `save_params`; raises CheckpointError if corrupt."""
    if latest_step(run_dir, at_most) != 0:
        return False
    return load_items(Path(run_dir), 0, {"data": None})["data"] == PARAMS_ONLY


def restore_latest(
    run_dir: str | Path, like: PyTree, at_most: int | None = None
) -> tuple[TrainState, Any] | None:
    """Restores the newest state and progress of a run; None without a checkpoint.

    Nothing on disk changes, also if an error is raised.

    Args:
        like: a state of the same structure, or its shapes, with the dtypes and shardings to restore
            to. They may differ from those of the saving run; a leaf without a sharding is restored
            to one device.
        at_most: ignores checkpoints after this step.

    Raises:
        CheckpointError: the checkpoint is corrupt or has another structure.
    """
    step = latest_step(run_dir, at_most)
    if step is None:
        return None
    like = abstract(like)
    stored = _as_stored(like, Path(run_dir, FOLDER, str(step)))
    restored = load_items(Path(run_dir), step, {"state": stored, "data": None})
    fields = restored["state"] if isinstance(stored, dict) else vars(restored["state"])
    state = like.replace(**fields | {"guard": _as_new(fields["guard"], like.guard)})
    return state, restored["data"]


def _as_stored(like: TrainState, folder: Path) -> Any:
    """The state with the fields that it has in a checkpoint, which may be older."""
    metadata = folder / "state" / "_METADATA"
    text = metadata.read_text(errors="replace") if metadata.is_file() else ""
    guard = like.guard
    if "usual_norm" in text or "('guard', 'first', " not in text:
        guard = _GUARDS["usual_norm" in text](guard.ema_grad_norm, guard.skipped)
    like = like.replace(guard=guard)
    absent = [x for x in ("ema", "carry") if f"('{x}'," not in text and getattr(like, x) is None]
    if not absent:
        return like
    return {name: value for name, value in vars(like).items() if name not in absent}


def _as_new(guard: Any, like: Guard) -> Guard:
    """A restored guard with all fields of this version."""
    if len(guard) == len(like):
        return Guard(*guard)

    def put(value: jax.Array, like: Any) -> jax.Array:
        return jax.make_array_from_callback(
            like.shape, like.sharding, np.broadcast_to(value, like.shape).__getitem__
        )

    return Guard(*guard, first=jax.tree.map(put, Guard.start().first, like.first))


def restore_params(
    run_dir: str | Path,
    step: int | None = None,
    shardings: Callable[[PyTree], PyTree] | None = None,
    *,
    ema: bool = False,
) -> tuple[ExperimentConfig, PyTree]:
    """Restores the config of a run and its parameters, those to evaluate (`eval_params`).

    Args:
        step: one of `steps`; None restores the newest.
        shardings: maps a tree to the shardings of its leaves, which may differ from those of
            the saving run; None restores to one device.
        ema: restore the moving average of the parameters instead.

    Raises:
        ConfigError: the directory contains no run, or no moving average with `ema`.
        CheckpointError: the run has no checkpoint of this step, or it is corrupt.
    """
    cfg, step = config_and_step(run_dir, step)
    if ema and not cfg.train.ema_decay:
        raise ConfigError(
            f"{run_dir} must have been trained with train.ema_decay above 0, got 0.0; leave ema "
            "(--ema) out."
        )
    shapes = adapters.attached_shapes(param_shapes(cfg.model), cfg.lora)
    params = abstract(shapes, None if shardings is None else shardings(shapes))
    trained, _ = partition(params, cfg.train.freeze)

    def like(stored: PyTree) -> PyTree:  # partial: the rest of the optimizer state is not read
        if ema:
            return {"params": params, "ema": trained}
        average = like_average(stored.get("opt_state"), trained, shardings)
        return {"params": params} | ({} if average is None else {"opt_state": average})

    state = load_items(Path(run_dir), step, {"state": like}, partial=True)["state"]
    if ema:
        _, frozen = partition(state["params"], cfg.train.freeze)
        return cfg, adapters.merged(combine(state["ema"], frozen), cfg.lora)
    return cfg, eval_params(cfg, state["params"], state.get("opt_state"))


def restore_adapters(
    run_dir: str | Path, step: int | None = None
) -> tuple[ExperimentConfig, PyTree]:
    """Restores the config and the LoRA adapters of a run alone; as `restore_params`."""
    cfg, step = config_and_step(run_dir, step)
    if not cfg.lora.rank:
        raise ConfigError(f"{run_dir} has no adapters; train one with lora.rank of at least 1.")
    shapes = adapters.attached_shapes(param_shapes(cfg.model), cfg.lora)
    like = {"params": abstract({ADAPTERS: shapes[ADAPTERS]})}
    state = load_items(Path(run_dir), step, {"state": like}, partial=True)["state"]
    return cfg, state["params"][ADAPTERS]


def config_and_step(run_dir: str | Path, step: int | None) -> tuple[ExperimentConfig, int]:
    """The config of a run, and a step with a checkpoint: the newest if None."""
    cfg = load_config(run_dir, ExperimentConfig)
    saved = steps(run_dir)
    if not saved:
        raise CheckpointError(f"{run_dir} has no checkpoint yet; train it first.")
    if step is not None and step not in saved:
        words = ", ".join(map(str, saved))
        raise CheckpointError(f"{run_dir} has no checkpoint of step {step}; use one of: {words}.")
    return cfg, saved[-1] if step is None else step


def like_average(
    stored: PyTree, params: PyTree, shardings: Callable[[PyTree], PyTree] | None
) -> Any:
    """The structure of a stored optimizer state, reduced to what `eval_params` needs; or None."""
    if isinstance(stored, dict) and set(ScheduleFreeState._fields) <= stored.keys():
        numbers = {name: stored[name] for name in ("b1", "weight_sum", "step_count", "max_lr")}
        numbers = {name: jax.ShapeDtypeStruct((), x.dtype) for name, x in numbers.items()}
        numbers = abstract(numbers, None if shardings is None else shardings(numbers))
        unread = jax.tree.map(lambda _: None, stored["base_optimizer_state"])
        return ScheduleFreeState(z=params, base_optimizer_state=unread, **numbers)
    if isinstance(stored, list):
        parts = [like_average(part, params, shardings) for part in stored]
        return None if all(part is None for part in parts) else parts
    if isinstance(stored, dict):
        named = {name: like_average(part, params, shardings) for name, part in stored.items()}
        return {name: part for name, part in named.items() if part is not None} or None
    return None
