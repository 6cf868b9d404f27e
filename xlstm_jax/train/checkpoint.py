"""Checkpoints of a run: one directory per step, which appears atomically.

RUN/config.json                     enough to rebuild the model
RUN/checkpoints/STEP/state          train state               (arrays)
RUN/checkpoints/STEP/data           progress                  (JSON)
RUN/checkpoints/STEP/config         config at this step       (JSON)
RUN/checkpoints/STEP/manifest.json  sizes and checksums of all these files

A run that starts from existing parameters has a checkpoint of step 0 with the parameters only.
"""

import collections
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from xlstm_jax.config import ConfigError, load_config
from xlstm_jax.modules.lm import param_shapes
from xlstm_jax.train import manifest
from xlstm_jax.train.config import ExperimentConfig
from xlstm_jax.train.guard import Guard
from xlstm_jax.train.state import TrainState
from xlstm_jax.typing import PyTree

FOLDER = "checkpoints"


class CheckpointError(ConfigError):
    """A checkpoint is missing or unreadable. The message is one line that includes a remedy."""


# `Guard` in checkpoints that were written before its field `usual_norm` was renamed.
_OldGuard = collections.namedtuple("_OldGuard", ("usual_norm", "skipped"))


class Checkpointer(contextlib.AbstractContextManager):
    """Writes the checkpoints of a run asynchronously and retains the newest `keep` of them."""

    def __init__(self, run_dir: str | Path, keep: int = 3):
        self._folder = Path(run_dir).resolve() / FOLDER
        self._step = latest_step(run_dir)  # of the last save, possibly still in progress
        self._manager = ocp.CheckpointManager(
            self._folder,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                enable_async_checkpointing=True,
                async_options=ocp.AsyncOptions(post_finalization_callback=self._write_manifest),
            ),
        )

    def _write_manifest(self) -> None:
        # Saves do not overlap, so the items just completed are those of this step. Their folder
        # still has a temporary name: the manifest and the items appear with one rename.
        drafts = self._folder.glob(f"{self._step}.orbax-checkpoint-tmp*")
        manifest.write(next(drafts, self._folder / str(self._step)))

    def save(
        self, step: int, state: TrainState, data_state: dict[str, Any], config: dict[str, Any]
    ) -> None:
        """Saves a step unless it is saved already. Copies `state`, which may then be donated."""
        if step == self._step:
            return
        # `_write_manifest` needs to know which save has completed.
        self._manager.wait_until_finished()
        self._step = step
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),
                data=ocp.args.JsonSave(data_state),
                config=ocp.args.JsonSave(config),
            ),
            force=True,  # the loop decides when to save, not a policy of the manager
        )

    def close(self) -> None:
        """Waits until all checkpoints are on disk."""
        self._manager.close()

    def __exit__(self, *error: object) -> None:
        self.close()


def steps(run_dir: str | Path) -> list[int]:
    """The steps with a complete checkpoint, oldest first."""
    # A checkpoint is renamed to the bare step number when it is complete.
    folders = (Path(run_dir) / FOLDER).glob("*")
    return sorted(int(path.name) for path in folders if path.name.isdecimal())


def latest_step(run_dir: str | Path) -> int | None:
    """The newest step with a complete checkpoint; None without any."""
    return max(steps(run_dir), default=None)


_PARAMS_ONLY = {"params_alone": True}  # stored in place of the progress


def save_params(run_dir: str | Path, params: PyTree, config: dict[str, Any]) -> None:
    """Saves parameters as step 0 of a new run, which then starts from them.

    Parameters are written a few at a time, without optimizer moments or a second copy of all of
    them in memory. They are not compressed: this would save a tenth and buffer each once more.
    """
    folder = Path(run_dir).resolve() / FOLDER / "0"
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
    gigabytes: Any = 1.01 * largest / 1e9  # admits the largest leaf; may be fractional
    handler = ocp.CompositeCheckpointHandler(
        state=ocp.PyTreeCheckpointHandler(save_concurrent_gb=gigabytes, use_compression=False),
        data=ocp.JsonCheckpointHandler(),
        config=ocp.JsonCheckpointHandler(),
    )
    with ocp.Checkpointer(handler) as writer:
        writer.save(
            folder,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave({"params": params}),
                data=ocp.args.JsonSave(_PARAMS_ONLY),
                config=ocp.args.JsonSave(config),
            ),
        )
    manifest.write(folder)


def has_params_only(run_dir: str | Path) -> bool:
    """Whether the newest checkpoint is of `save_params`; raises CheckpointError if corrupt."""
    if latest_step(run_dir) != 0:
        return False
    args = ocp.args.Composite(data=ocp.args.JsonRestore())
    return _restore(Path(run_dir), 0, args).data == _PARAMS_ONLY


def restore_latest(run_dir: str | Path, like: PyTree) -> tuple[TrainState, dict[str, Any]] | None:
    """Restores the newest state and progress of a run; None without a checkpoint.

    Nothing on disk changes, also if an error is raised.

    Args:
        like: a state of the same structure, or its shapes, with the dtypes and shardings to restore
            to. They may differ from those of the saving run; a leaf without a sharding is restored
            to one device.

    Raises:
        CheckpointError: the checkpoint is corrupt or has another structure.
    """
    step = latest_step(run_dir)
    if step is None:
        return None
    metadata = Path(run_dir, FOLDER, str(step), "state", "_METADATA")
    if metadata.is_file() and "usual_norm" in metadata.read_text(errors="replace"):
        like = like.replace(guard=_OldGuard(*like.guard))
    args = ocp.args.Composite(
        state=ocp.args.StandardRestore(_abstract(like)), data=ocp.args.JsonRestore()
    )
    restored = _restore(Path(run_dir), step, args)
    return restored.state.replace(guard=Guard(*restored.state.guard)), restored.data


def restore_params(
    run_dir: str | Path, step: int | None = None, place: Callable[[PyTree], PyTree] | None = None
) -> tuple[ExperimentConfig, PyTree]:
    """Restores the config and the parameters of a run.

    Args:
        step: one of `steps`; None restores the newest.
        place: maps a tree to the shardings of its leaves, which may differ from those of the saving
            run; None restores to one device.

    Raises:
        ConfigError: the directory contains no run.
        CheckpointError: the run has no checkpoint of this step, or it is corrupt.
    """
    cfg = load_config(run_dir, ExperimentConfig)
    saved = steps(run_dir)
    if not saved:
        raise CheckpointError(f"{run_dir} has no checkpoint yet; train it first.")
    if step is not None and step not in saved:
        words = ", ".join(map(str, saved))
        raise CheckpointError(f"{run_dir} has no checkpoint of step {step}; use one of: {words}.")
    shapes = param_shapes(cfg.model)
    like = {"params": _abstract(shapes, None if place is None else place(shapes))}
    # Partial: the optimizer state is not read.
    item = ocp.args.PyTreeRestore(
        item=like,
        restore_args=ocp.checkpoint_utils.construct_restore_args(like),
        partial_restore=True,
    )
    step = saved[-1] if step is None else step
    restored = _restore(Path(run_dir), step, ocp.args.Composite(state=item))
    return cfg, restored.state["params"]


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


def _restore(run_dir: Path, step: int, args: ocp.args.Composite) -> Any:
    folder = run_dir.resolve() / FOLDER / str(step)
    earlier = [other for other in steps(run_dir) if other < step]
    way_out = "it is the only one, so start again with fresh=True (--fresh)"
    if earlier:
        way_out = f"delete {run_dir / FOLDER / str(step)} to resume from step {earlier[-1]}"
    problem = manifest.verify(folder)
    if problem is not None:
        raise CheckpointError(f"{problem}; {way_out}.")
    # Not with a CheckpointManager, which deletes unfinished checkpoints when it is opened.
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
            return reader.restore(folder, args=args)
    # The array store raises many types of exception, including a bare Exception.
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:200] or type(error).__name__
        raise CheckpointError(
            f"{folder} must be a complete checkpoint of this config, but it cannot be read "
            f"({reason}); {way_out}."
        ) from error
