"""The training loop, and what it touches on the host."""

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from xlstm_jax.config import to_dict
from xlstm_jax.data import loader
from xlstm_jax.data.batch import Examples
from xlstm_jax.train import metrics, rundir
from xlstm_jax.train.checkpoint import Checkpointer, latest_step
from xlstm_jax.train.clock import Clock
from xlstm_jax.train.guard import DivergedError
from xlstm_jax.train.processes import Stop
from xlstm_jax.train.program import TrainProgram
from xlstm_jax.train.state import TrainState
from xlstm_jax.train.writers import Writer

_MEMORY = {"bytes_in_use": "memory_in_use", "peak_bytes_in_use": "memory_peak"}  # theirs: ours


@dataclasses.dataclass(kw_only=True)
class Progress:
    """Saved beside the state, so that an interruption between two records leaves no trace."""

    step: int = 0  # batches seen; this is the whole data position
    tokens_seen: int = 0  # up to the last record
    totals: metrics.Totals = dataclasses.field(default_factory=metrics.empty)  # since then
    evaluation: dict[str, Any] | None = None  # the last one, with its step

    def to_json(self) -> dict[str, Any]:
        """For a checkpoint; float32 survives the way through JSON bit for bit."""
        totals = jax.tree.map(float, jax.device_get(self.totals))
        return vars(self) | {"totals": totals._asdict()}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Progress":
        """The inverse of `to_json`."""
        totals: Any = metrics.Totals(**values["totals"])
        totals = jax.tree.map(lambda x, y: np.asarray(y, x.dtype), metrics.empty(), totals)
        return cls(**values | {"totals": totals})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outputs(contextlib.AbstractContextManager):
    """Where a run writes; closed at the end of the context, when everything is on disk."""

    run_dir: Path
    writers: Sequence[Writer]  # take the records
    checkpoints: Checkpointer
    flops_per_step: float | None = None  # of the model; None leaves the rate out of the records

    def __exit__(self, *error: object) -> None:
        try:
            self.checkpoints.close()
        finally:
            for writer in self.writers:
                writer.close()


class Loop:
    """Steps, records, evaluations and checkpoints, each when it is due.

    Metrics stay on the device for a whole interval and are fetched while the step after it runs, so
    logging never leaves the device idle.

    The devices of `program` must be active. `state` is donated to its first step, and `progress`,
    which belongs to it, is kept up to date. Without `valid` there is no held-out loss.
    """

    def __init__(
        self,
        program: TrainProgram,
        state: TrainState,
        progress: Progress,
        train: Examples,
        valid: Examples | None,
        outputs: Outputs,
        stop: Stop,
    ):
        self.state, self.progress = state, progress
        progress.totals = program.devices.replicate(progress.totals)
        self._program, self._cfg, self._devices = program, program.cfg, program.devices
        self._train, self._valid, self._outputs, self._stop = train, valid, outputs, stop
        self._clock = Clock()
        self._complete: tuple[int, metrics.Totals] | None = None  # an interval not yet fetched
        self._saved_at = time.monotonic()

    def run(self) -> None:
        """Steps until the last one or until asked to stop; saves in either case."""
        cfg, progress = self._cfg.train, self.progress
        share = self._devices.share_of_rows(self._cfg.data.batch_size)
        with loader.batches(
            self._train,
            self._cfg.data,
            progress.step,
            cfg.steps - progress.step,
            host_index=share.index,
            host_count=share.count,
        ) as batches:
            self._evaluate_if_due()  # where the run was stopped, if that was before it was done
            while progress.step < cfg.steps and not self._stop.at(progress.step):
                with self._clock.measure("wait"):
                    batch = next(batches)
                batch = self._devices.batch(batch, self._cfg.data.batch_size)
                self.state, progress.totals = self._program.step(self.state, progress.totals, batch)
                progress.step += 1
                if self._clock.running:
                    self._clock.step()
                else:
                    # The first step compiled the program; the clock begins when it is over.
                    jax.block_until_ready(progress.totals)
                    self._clock.start()
                self._record()
                if progress.step % cfg.log_every == 0:
                    self._close_interval()
                self._evaluate_if_due()
                if self._is_checkpoint_due():
                    self._save()
        self._record()
        if progress.step == cfg.steps:
            if float(progress.totals.steps) > 0:
                self._close_interval()
            self._evaluate()
        self._save()

    def _is_checkpoint_due(self) -> bool:
        cfg, step = self._cfg.train, self.progress.step
        if cfg.checkpoint_every and step % cfg.checkpoint_every == 0:
            return True
        minutes = (time.monotonic() - self._saved_at) / 60
        due = cfg.checkpoint_minutes > 0 and minutes >= cfg.checkpoint_minutes
        if jax.process_count() == 1 or cfg.checkpoint_minutes == 0:
            return due
        # The clock of the first process counts, and is asked for now and then.
        return step % cfg.log_every == 0 and bool(multihost_utils.broadcast_one_to_all(due))

    def _close_interval(self) -> None:
        self._complete = (self.progress.step, self.progress.totals)
        self.progress.totals = self._devices.replicate(metrics.empty())

    def _record(self) -> None:
        """Fetches and writes the interval that is complete, if any."""
        if self._complete is None:
            return
        (step, totals), self._complete = self._complete, None
        record: dict[str, Any] = metrics.summarize(totals)
        self.progress.tokens_seen += record["tokens"]
        record |= {"tokens_seen": self.progress.tokens_seen} | self._clock.lap()
        if "step_time" in record:
            tokens_per_step = record["tokens"] / float(totals.steps)
            record["tokens_per_second"] = tokens_per_step / record["step_time"]
            if self._outputs.flops_per_step is not None:
                rate = self._outputs.flops_per_step / record["step_time"]
                record["model_flops_per_second"] = rate
        # Of the first device, where its backend tells.
        stats = jax.local_devices()[0].memory_stats() or {}
        record |= {ours: stats[theirs] for theirs, ours in _MEMORY.items() if theirs in stats}
        self._write(step, record)
        self._check_skipped(record["skipped_in_a_row"])

    def _write(self, step: int, record: dict[str, Any]) -> None:
        for writer in self._outputs.writers:
            writer.write(step, record)

    def _evaluate_if_due(self) -> None:
        every, step = self._cfg.train.eval_every, self.progress.step
        if every and step and step % every == 0:
            self._evaluate()

    def _evaluate(self) -> None:
        """Once per step at most; a run that is asked to stop does it when it is resumed."""
        progress, valid = self.progress, self._valid
        if valid is None or (progress.evaluation or {}).get("step") == progress.step:
            return
        self._record()
        with self._clock.measure("pause"):
            measured = self._program.evaluate(
                self.state.params, valid, lambda: self._stop.requested
            )
        if measured is not None:
            self._write(progress.step, measured)
            progress.evaluation = {"step": progress.step} | measured

    def _save(self) -> None:
        self._record()
        self._check_skipped(int(self.state.guard.skipped))
        data = self.progress.to_json() | {"data": self._train.description}
        with self._clock.measure("pause"):
            self._outputs.checkpoints.save(self.progress.step, self.state, data, to_dict(self._cfg))
        self._saved_at = time.monotonic()

    def _check_skipped(self, in_a_row: int) -> None:
        """Ends a run that has diverged, naming the windows it could not learn from."""
        limit, guard = self._cfg.train.max_consecutive_skips, self.state.guard
        if in_a_row < limit:
            return
        first = self.progress.step - int(guard.skipped)
        index = {
            str(step): loader.batch_at(self._train, self._cfg.data, step).index.tolist()
            for step in range(first, first + limit)
        }
        usual = float(guard.ema_grad_norm)
        dump = {"first_skipped_step": first, "ema_grad_norm": usual, "index_of_step": index}
        rundir.write_json(self._outputs.run_dir / rundir.DIVERGED, dump)
        saved = latest_step(self._outputs.run_dir)
        raise DivergedError(
            f"{limit} updates in a row were discarded from step {first} on, as their loss or "
            "gradient was not finite or the gradient's norm was far above the usual "
            f"{usual:.3g}; lower train.lr in a new run, or resume this one to meet the same "
            f"batches again from {'the beginning' if saved is None else f'step {saved}'}."
        )
