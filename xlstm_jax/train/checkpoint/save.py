"""Writes checkpoints: asynchronously during a run, or of parameters alone."""

import concurrent.futures
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint.experimental.v1 as ocp

from xlstm_jax.train.checkpoint.files import (
    FOLDER,
    PARAMS_ONLY,
    delete,
    disk_errors,
    draft_of,
    find_drafts,
    latest_step,
    publish,
    steps,
    store_context,
)
from xlstm_jax.train.processes import log
from xlstm_jax.typing import PyTree


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
        if jax.process_index() == 0 and (drafts := find_drafts(self._folder)):
            names = ", ".join(path.name for path in drafts)
            log.warning("deleted incomplete checkpoints in %s: %s", self._folder, names)
            delete(*drafts)

    def save(
        self, step: int, state: PyTree, data_state: dict[str, Any], config: dict[str, Any]
    ) -> None:
        """Saves a step unless it is saved already. Copies `state`, which may then be donated."""
        if step == self._step:
            return
        self.wait()
        self._step = step
        folder, context = self._folder / str(step), store_context()
        with disk_errors(folder), context:
            items = {"state": state, "data": data_state, "config": config}
            response = ocp.save_checkpointables_async(str(draft_of(folder)), items)
        self._saving = self._thread.submit(self._complete, folder, response.result)

    def _complete(self, folder: Path, wait: Callable[..., None]) -> None:
        try:
            wait()
            if jax.process_index() == 0:
                publish(folder)
        except BaseException:
            if jax.process_index() == 0:  # a full disk needs the space
                delete(*find_drafts(self._folder))
            raise
        if jax.process_index() == 0:
            saved = steps(self._folder.parent)
            delete(*(self._folder / str(step) for step in saved[: -self._keep]))

    def wait(self) -> None:
        """Waits until the last save is on disk."""
        saving, self._saving = self._saving, None  # releases what the save has buffered
        if saving is not None:
            with disk_errors(self._folder):
                saving.result()

    def rewind(self, step: int) -> None:
        """Deletes the checkpoints after a step, from which the run then continues."""
        self.wait()
        if jax.process_index() == 0:
            later = [saved for saved in steps(self._folder.parent) if saved > step]
            # The newest first: if this is interrupted, the run resumes before the deleted ones.
            delete(*(self._folder / str(saved) for saved in reversed(later)))
        self._step = step

    def close(self) -> None:
        """Waits until all checkpoints are on disk."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def __exit__(self, *error: object) -> None:
        self.close()


def save_params(run_dir: str | Path, params: PyTree, config: dict[str, Any]) -> None:
    """Saves parameters as step 0 of a new run, which then starts from them.

    Parameters are written a few at a time, without optimizer moments or a second copy of all of
    them in memory.
    """
    folder, context = Path(run_dir).resolve() / FOLDER / "0", store_context()
    # Admits the largest leaf.
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
    context.memory.write_concurrent_bytes = int(1.01 * largest) + 1
    context.memory.deepcopy_host_arrays = False
    with disk_errors(folder), context:
        items = {"state": {"params": params}, "data": PARAMS_ONLY, "config": config}
        ocp.save_checkpointables(str(draft_of(folder)), items)
    publish(folder)
