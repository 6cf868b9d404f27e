"""Where the results of a run go: writers, checkpoints, pictures, exports and a trace."""

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from xlstm_jax.sharding.distributed import is_peer_failure
from xlstm_jax.train import gate_plot, rundir
from xlstm_jax.train.checkpoint import Checkpointer
from xlstm_jax.train.processes import extra
from xlstm_jax.train.profiler import Profiler
from xlstm_jax.train.writers import Writer
from xlstm_jax.typing import PyTree

Exporter = Callable[[Path, PyTree], None]
"""Writes parameters to a new folder in another layout."""


@dataclasses.dataclass(kw_only=True)
class Outputs(contextlib.AbstractContextManager):
    """Destinations of records and checkpoints; at the end of the context all are on disk."""

    run_dir: Path
    writers: Sequence[Writer]  # each receives every record
    checkpoints: Checkpointer
    profiler: Profiler
    exporter: Exporter | None = None
    _gates: tuple[int, dict[str, Any]] | None = None  # statistics without a picture
    _exported: int | None = None  # last step

    def write(self, step: int, record: dict[str, Any]) -> None:
        """Passes a record to all writers."""
        for writer in self.writers:
            writer.write(step, record)
        if "gates" in record:
            self._gates = step, record["gates"]

    def picture(self, step: int) -> None:
        """Draws the statistics of gates since the last picture, if any, beside checkpoint `step`.

        Once per checkpoint and not per record: it takes half a second.
        """
        gates, self._gates = self._gates, None
        if gates is None or jax.process_index() > 0:
            return
        path = self.run_dir / rundir.GATES / f"{step}.png"
        with extra(f"the picture {rundir.GATES}/{path.name}"):
            path.parent.mkdir(exist_ok=True)
            gate_plot.draw(gates[1], path, f"{self.run_dir.name}, step {gates[0]}")

    def export(self, step: int, params: PyTree) -> None:
        """Exports parameters to RUN/export/STEP; a failure is logged."""
        if self.exporter is None or step == self._exported:
            return
        self._exported = step
        if jax.process_count() > 1:  # no process has all parameters, and the first one writes
            params = multihost_utils.process_allgather(params, tiled=True)
        folder = self.run_dir / rundir.EXPORT / str(step)
        if jax.process_index() > 0 or folder.exists():
            return
        draft = folder.with_suffix(".tmp")  # a folder named by a bare number is complete
        with extra(f"the export {rundir.EXPORT}/{step}"):
            try:
                shutil.rmtree(draft, ignore_errors=True)
                draft.parent.mkdir(exist_ok=True)
                self.exporter(draft, params)
                draft.rename(folder)
            except BaseException:
                shutil.rmtree(draft, ignore_errors=True)
                raise

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        # Writers are closed even if a save has failed.
        try:
            if not is_peer_failure(error):  # a save would wait for the process that has died
                self.checkpoints.close()
        finally:
            self.profiler.stop()
            for writer in self.writers:
                with extra(f"closing {type(writer).__name__}"):
                    writer.close()
