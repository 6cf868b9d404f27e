"""Checkpoints of a run: one directory per step, which appears atomically.

RUN/config.json                     enough to rebuild the model
RUN/checkpoints/STEP/state          train state               (arrays)
RUN/checkpoints/STEP/data           progress                  (JSON)
RUN/checkpoints/STEP/config         config at this step       (JSON)
RUN/checkpoints/STEP/manifest.json  sizes and checksums of all these files

A save writes to STEP.tmp, which is renamed to the bare number when it is complete. A run that
starts from existing parameters has a checkpoint of step 0 with the parameters only.
"""

import collections
import concurrent.futures
import contextlib
import errno
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from optax.contrib import ScheduleFreeState

from xlstm_jax.config import ConfigError, load_config
from xlstm_jax.errors import quote_path
from xlstm_jax.modules.lm import param_shapes
from xlstm_jax.train import manifest
from xlstm_jax.train.config import ExperimentConfig
from xlstm_jax.train.guard import Guard
from xlstm_jax.train.lora import adapters
from xlstm_jax.train.processes import log
from xlstm_jax.train.state import TrainState, eval_params
from xlstm_jax.train.trainable import ADAPTERS, combine, partition
from xlstm_jax.typing import PyTree

FOLDER = "checkpoints"


class CheckpointError(ConfigError):
    """A checkpoint is missing or unreadable. The message is one line that includes a remedy."""


# `Guard` in older checkpoints, before it had the field `first`, and before a field was renamed.
_GUARDS = [
    collections.namedtuple("_Guard", (name, "skipped")) for name in ("ema_grad_norm", "usual_norm")
]


class Checkpointer(contextlib.AbstractContextManager):
    """Writes the checkpoints of a run asynchronously and retains the newest `keep` of them.

    Opening it deletes what interrupted saves have left behind. If a save fails, the error is raised
    by the next call, and the earlier checkpoints remain; errors of the disk are `OSError`.
    """

    def __init__(self, run_dir: str | Path, keep: int = 3):
        self._folder, self._keep = Path(run_dir).resolve() / FOLDER, keep
        self._step = latest_step(run_dir)  # of the last save, possibly still in progress
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "save")
        self._saving: concurrent.futures.Future[None] | None = None
        if jax.process_index() == 0 and (drafts := _drafts(self._folder)):
            names = ", ".join(path.name for path in drafts)
            log.warning("deleted incomplete checkpoints in %s: %s", self._folder, names)
            _delete(*drafts)

    def save(
        self, step: int, state: TrainState, data_state: dict[str, Any], config: dict[str, Any]
    ) -> None:
        """Saves a step unless it is saved already. Copies `state`, which may then be donated."""
        if step == self._step:
            return
        self.wait()
        self._step = step
        folder, context = self._folder / str(step), _context()
        with _disk_errors(folder), context:
            items = {"state": state, "data": data_state, "config": config}
            response = ocp.save_checkpointables_async(str(_draft(folder)), items)
        self._saving = self._thread.submit(self._complete, folder, response.result)

    def _complete(self, folder: Path, wait: Callable[..., None]) -> None:
        try:
            wait()
            if jax.process_index() == 0:
                _publish(folder)
        except BaseException:
            if jax.process_index() == 0:  # a full disk needs the space
                _delete(*_drafts(self._folder))
            raise
        if jax.process_index() == 0:
            saved = steps(self._folder.parent)
            _delete(*(self._folder / str(step) for step in saved[: -self._keep]))

    def wait(self) -> None:
        """Waits until the last save is on disk."""
        saving, self._saving = self._saving, None  # releases what the save has buffered
        if saving is not None:
            with _disk_errors(self._folder):
                saving.result()

    def rewind(self, step: int) -> None:
        """Deletes the checkpoints after a step, from which the run then continues."""
        self.wait()
        if jax.process_index() == 0:
            later = [saved for saved in steps(self._folder.parent) if saved > step]
            # The newest first: if this is interrupted, the run resumes before the deleted ones.
            _delete(*(self._folder / str(saved) for saved in reversed(later)))
        self._step = step

    def close(self) -> None:
        """Waits until all checkpoints are on disk."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def __exit__(self, *error: object) -> None:
        self.close()


def _context() -> ocp.Context:
    """The settings of the store for one operation."""
    logging.getLogger("absl").addFilter(_is_not_raised)  # which is added once only
    registry = ocp.handlers.local_registry()
    for name in ("data", "config"):  # they would be taken for trees of arrays
        registry.add(ocp.handlers.JsonHandler, checkpointable_name=name)
    context = ocp.Context()
    context.checkpointables.registry = registry
    # It would save a tenth of the size, for four times the time and a copy of every array.
    context.array.saving.use_compression = False
    return context


def _draft(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.tmp")


def _drafts(folder: Path) -> list[Path]:
    """Incomplete checkpoints: STEP.tmp, and the temporary folders of the store."""
    return sorted(p for p in folder.glob("*.*tmp*") if re.match(_DRAFT, p.name) and p.is_dir())


_DRAFT = r"\d+(\.tmp)?(\.orbax-checkpoint-tmp.*)?$"


def _publish(folder: Path) -> None:
    """Completes a checkpoint: the manifest and all items appear with one rename."""
    manifest.write(_draft(folder))
    os.replace(_draft(folder), folder)


def _delete(*folders: Path) -> None:
    """Deletes checkpoints, which are incomplete from the beginning."""
    for folder in folders:
        draft = folder if folder.name.count(".") else _draft(folder)
        with contextlib.suppress(OSError):
            os.replace(folder, draft)
        shutil.rmtree(draft, ignore_errors=True)


def delete_all(run_dir: Path) -> None:
    """Deletes the checkpoints of a run, complete or not, and their folder if it is then empty."""
    folder = run_dir / FOLDER
    _delete(*(folder / str(step) for step in reversed(steps(run_dir))), *_drafts(folder))
    with contextlib.suppress(OSError):
        folder.rmdir()


def _is_not_raised(record: logging.LogRecord) -> bool:
    """Drops tracebacks that threads of the store print of errors which are also raised."""
    return "_SignalingThread.run() raised an exception" not in record.getMessage()


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    """Raises failures of the disk as `OSError`, which the array store reports as text only."""
    try:
        yield
    except Exception as error:
        number = _os_error_number(error)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def _os_error_number(error: BaseException | None) -> int | None:
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            return error.errno
        if match := re.search(r"\[os_error_code='(\d+)'", str(error)):
            return int(match[1])
        error = error.__cause__ or error.__context__
    return None


def steps(run_dir: str | Path) -> list[int]:
    """The steps with a complete checkpoint, oldest first."""
    folders = (Path(run_dir) / FOLDER).glob("*")
    return sorted(int(path.name) for path in folders if path.name.isdecimal() and path.is_dir())


def latest_step(run_dir: str | Path, at_most: int | None = None) -> int | None:
    """The newest step with a complete checkpoint, at most `at_most`; None without any."""
    saved = steps(run_dir)
    return max((step for step in saved if at_most is None or step <= at_most), default=None)


_PARAMS_ONLY = {"params_alone": True}  # stored in place of the progress


def save_params(run_dir: str | Path, params: PyTree, config: dict[str, Any]) -> None:
    """Saves parameters as step 0 of a new run, which then starts from them.

    Parameters are written a few at a time, without optimizer moments or a second copy of all of
    them in memory.
    """
    folder, context = Path(run_dir).resolve() / FOLDER / "0", _context()
    # Admits the largest leaf.
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
    context.memory.write_concurrent_bytes = int(1.01 * largest) + 1
    context.memory.deepcopy_host_arrays = False
    with _disk_errors(folder), context:
        items = {"state": {"params": params}, "data": _PARAMS_ONLY, "config": config}
        ocp.save_checkpointables(str(_draft(folder)), items)
    _publish(folder)


def has_params_only(run_dir: str | Path, at_most: int | None = None) -> bool:
    """Whether the newest checkpoint is of `save_params`; raises CheckpointError if corrupt."""
    if latest_step(run_dir, at_most) != 0:
        return False
    return _restore(Path(run_dir), 0, {"data": None})["data"] == _PARAMS_ONLY


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
    like = _abstract(like)
    stored = _as_stored(like, Path(run_dir, FOLDER, str(step)))
    restored = _restore(Path(run_dir), step, {"state": stored, "data": None})
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
    place: Callable[[PyTree], PyTree] | None = None,
    *,
    ema: bool = False,
) -> tuple[ExperimentConfig, PyTree]:
    """Restores the config of a run and its parameters, those to evaluate (`eval_params`).

    Args:
        step: one of `steps`; None restores the newest.
        place: maps a tree to the shardings of its leaves, which may differ from those of the saving
            run; None restores to one device.
        ema: restore the moving average of the parameters instead.

    Raises:
        ConfigError: the directory contains no run, or no moving average with `ema`.
        CheckpointError: the run has no checkpoint of this step, or it is corrupt.
    """
    cfg, step = _config_and_step(run_dir, step)
    if ema and not cfg.train.ema_decay:
        raise ConfigError(
            f"{run_dir} must have been trained with train.ema_decay above 0, got 0.0; leave ema "
            "(--ema) out."
        )
    shapes = adapters.attached_shapes(param_shapes(cfg.model), cfg.lora)
    params = _abstract(shapes, None if place is None else place(shapes))
    trained, _ = partition(params, cfg.train.freeze)

    def like(stored: PyTree) -> PyTree:  # partial: the rest of the optimizer state is not read
        if ema:
            return {"params": params, "ema": trained}
        average = _like_average(stored.get("opt_state"), trained, place)
        return {"params": params} | ({} if average is None else {"opt_state": average})

    state = _restore(Path(run_dir), step, {"state": like}, partial=True)["state"]
    if ema:
        _, frozen = partition(state["params"], cfg.train.freeze)
        return cfg, adapters.merged(combine(state["ema"], frozen), cfg.lora)
    return cfg, eval_params(cfg, state["params"], state.get("opt_state"))


def restore_adapters(
    run_dir: str | Path, step: int | None = None
) -> tuple[ExperimentConfig, PyTree]:
    """Restores the config and the LoRA adapters of a run alone; as `restore_params`."""
    cfg, step = _config_and_step(run_dir, step)
    if not cfg.lora.rank:
        raise ConfigError(f"{run_dir} has no adapters; train one with lora.rank of at least 1.")
    shapes = adapters.attached_shapes(param_shapes(cfg.model), cfg.lora)
    like = {"params": _abstract({ADAPTERS: shapes[ADAPTERS]})}
    state = _restore(Path(run_dir), step, {"state": like}, partial=True)["state"]
    return cfg, state["params"][ADAPTERS]


def _config_and_step(run_dir: str | Path, step: int | None) -> tuple[ExperimentConfig, int]:
    """The config of a run, and a step with a checkpoint: the newest if None."""
    cfg = load_config(run_dir, ExperimentConfig)
    saved = steps(run_dir)
    if not saved:
        raise CheckpointError(f"{run_dir} has no checkpoint yet; train it first.")
    if step is not None and step not in saved:
        words = ", ".join(map(str, saved))
        raise CheckpointError(f"{run_dir} has no checkpoint of step {step}; use one of: {words}.")
    return cfg, saved[-1] if step is None else step


def _like_average(stored: PyTree, params: PyTree, place: Callable[[PyTree], PyTree] | None) -> Any:
    """The structure of a stored optimizer state, reduced to what `eval_params` needs; or None."""
    if isinstance(stored, dict) and set(ScheduleFreeState._fields) <= stored.keys():
        numbers = {name: stored[name] for name in ("b1", "weight_sum", "step_count", "max_lr")}
        numbers = {name: jax.ShapeDtypeStruct((), x.dtype) for name, x in numbers.items()}
        numbers = _abstract(numbers, None if place is None else place(numbers))
        unread = jax.tree.map(lambda _: None, stored["base_optimizer_state"])
        return ScheduleFreeState(z=params, base_optimizer_state=unread, **numbers)
    if isinstance(stored, list):
        parts = [_like_average(part, params, place) for part in stored]
        return None if all(part is None for part in parts) else parts
    if isinstance(stored, dict):
        named = {name: _like_average(part, params, place) for name, part in stored.items()}
        return {name: part for name, part in named.items() if part is not None} or None
    return None


def _abstract(tree: PyTree, shardings: PyTree = None) -> PyTree:
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


def _restore(
    run_dir: Path, step: int, items: dict[str, Any], *, partial: bool = False
) -> dict[str, Any]:
    """Restores items of a checkpoint.

    `partial` reads only the given leaves of a state, which may be a function of the stored one.
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
    problem = manifest.verify(folder)
    if problem is not None:
        raise CheckpointError(f"{problem}; {way_out}.")
    context = _context()
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
        if (number := _os_error_number(error)) not in (None, errno.ENOENT):
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
            return f"{name} is {other} there and {ours} in the config"
    return None
