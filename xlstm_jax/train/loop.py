"""The training loop: steps, metrics, evaluations and checkpoints."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from xlstm_jax.config import to_dict
from xlstm_jax.data.batch import Examples
from xlstm_jax.errors import quote
from xlstm_jax.sharding.distributed import is_peer_failure
from xlstm_jax.train import dump, metrics, rewind, rundir
from xlstm_jax.train.batches import TrainBatches
from xlstm_jax.train.checkpoint import Checkpointer, CheckpointError, latest_step
from xlstm_jax.train.clock import Clock
from xlstm_jax.train.guard import DivergedError
from xlstm_jax.train.processes import Stop, extra
from xlstm_jax.train.program import TrainProgram
from xlstm_jax.train.state import TrainState
from xlstm_jax.train.writers import Writer

# Key of JAX -> key of a record.
_MEMORY = {"bytes_in_use": "memory_in_use", "peak_bytes_in_use": "memory_peak"}


@dataclasses.dataclass(kw_only=True)
class Progress:
    """Host state of a run, saved with every checkpoint, so that resuming is exact."""

    step: int = 0  # batches consumed; determines the next batch
    tokens_seen: int = 0  # until the last record
    # Since the last record.
    totals: metrics.Totals = dataclasses.field(default_factory=metrics.empty)
    evaluation: dict[str, Any] | None = None  # the last result, with its step
    skips: rewind.Skips = dataclasses.field(default_factory=list)  # one per rewind

    def to_json(self) -> dict[str, Any]:
        """The JSON values of a checkpoint; float32 round-trips through JSON exactly."""
        totals = jax.tree.map(float, jax.device_get(self.totals))
        return vars(self) | {"totals": totals._asdict()}

    @classmethod
    def from_json(cls, values: Any) -> tuple["Progress", dict[str, Any]]:
        """The progress and the description of the data that `Loop` saved with it.

        Raises:
            CheckpointError: the values are not of a progress.
        """
        try:
            data, totals = values["data"], metrics.Totals(**values["totals"])
            # JSON has no float32, so the dtypes come from fresh totals.
            totals: Any = jax.tree.map(lambda x, y: np.asarray(y, x.dtype), metrics.empty(), totals)
            values = {name: value for name, value in values.items() if name != "data"}
            skips = [(int(step), int(end)) for step, end in values.get("skips", ())]
            return cls(**values | {"totals": totals, "skips": skips}), dict(data)
        except (TypeError, KeyError, ValueError) as error:
            raise CheckpointError(
                f"the item `data` of the checkpoint must be the progress of a run, but it is "
                f"damaged ({quote(values)}); delete that checkpoint to resume from the one before."
            ) from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outputs(contextlib.AbstractContextManager):
    """Destinations of records and checkpoints; at the end of the context all are on disk."""

    run_dir: Path
    writers: Sequence[Writer]  # each receives every record
    checkpoints: Checkpointer
    flops_per_step: float | None = None  # of the model; None omits the FLOP rate from records

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        # Writers are closed even if a save has failed.
        try:
            if not is_peer_failure(error):  # a save would wait for the process that has died
                self.checkpoints.close()
        finally:
            for writer in self.writers:
                with extra(f"closing {type(writer).__name__}"):
                    writer.close()


class Loop:
    """Runs steps, and writes records, evaluations and checkpoints when they are due.

    Metrics accumulate on the device for one interval and are fetched while the next step runs, so
    logging does not leave the device idle.

    The devices of `program` must be active. `state` is donated to the first step, and `progress` is
    updated in place. `held_out` are sets to evaluate, by the prefix of their metrics. `resume`
    restores the newest checkpoint.
    """

    def __init__(
        self,
        program: TrainProgram,
        state: TrainState,
        progress: Progress,
        train: TrainBatches,
        held_out: Mapping[str, Examples],
        outputs: Outputs,
        stop: Stop,
        resume: Callable[[], tuple[TrainState, Progress] | None],
    ):
        self.state, self.progress = state, progress
        progress.totals = program.devices.replicate(progress.totals)
        self._program, self._cfg, self._devices = program, program.cfg, program.devices
        self._train, self._held_out, self._outputs, self._stop = train, held_out, outputs, stop
        self._clock = Clock()
        self._pending: tuple[int, metrics.Totals] | None = None  # a complete interval to fetch
        self._saved_at = time.monotonic()
        self._resume = resume
        self._dumped = -1  # the step of the last dump

    def run(self) -> None:
        """Trains until the last step or a stop request, and saves a checkpoint in either case."""
        if self._cfg.train.spike_rewinds and self.progress.step == 0:
            self._save()  # to return to
        while True:
            try:
                return self._run()
            except DivergedError as error:
                self._rewind(error)

    def _rewind(self, error: DivergedError) -> None:
        """Returns to a checkpoint before the spike; raises the error if no rewinds are left."""
        skips, run_dir = self.progress.skips, self._outputs.run_dir
        first = int(self.state.guard.first.step)
        skip = rewind.next_skip(run_dir, self._cfg.train, first, skips)
        if skip is None:
            raise error
        rewind.discard_after(run_dir, self._outputs.checkpoints, skip)
        del self.state  # there may be no memory for two states
        self._pending = None
        resumed = self._resume()
        assert resumed is not None
        self.state, progress = resumed
        totals = self._devices.replicate(progress.totals)
        vars(self.progress).update(vars(progress), totals=totals, skips=[*skips, skip])
        self._train = self._train.skip(self.progress.skips)

    def _run(self) -> None:
        cfg, progress = self._cfg.train, self.progress
        sizes = self._cfg.batch_sizes
        share = self._devices.share_of_batch(self._cfg.data.batch_size)
        hosts = dict(host_index=share.index, host_count=share.count)
        with self._train.batches(progress.step, cfg.steps - progress.step, **hosts) as batches:
            # A run that was stopped during an evaluation repeats it when it is resumed.
            self._evaluate_if_due()
            while progress.step < cfg.steps and not self._stop.at(progress.step):
                with self._clock.measure("wait"):
                    batch = next(batches)
                batch = self._devices.batch(batch, sizes.at(progress.step))
                self.state, progress.totals = self._program.step(self.state, progress.totals, batch)
                progress.step += 1
                if self._clock.running:
                    self._clock.step()
                else:
                    # The first step includes compilation, so the clock starts after it.
                    jax.block_until_ready(progress.totals)
                    self._clock.start()
                    self._stop.listen()  # from now on there is something to save
                # After the dispatch: the device computes this step while the host waits for the
                # totals of the interval before it.
                self._record()
                if progress.step % cfg.log_every == 0:
                    self._close_interval()
                self._evaluate_if_due()
                if self._is_checkpoint_due():
                    self._save()
        self._record()
        if progress.step == cfg.steps:
            if float(progress.totals.steps) > 0:  # the last interval may be shorter
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
        # All processes must agree, so the first one decides; the broadcast blocks, so not at
        # every step.
        return step % cfg.log_every == 0 and bool(multihost_utils.broadcast_one_to_all(due))

    def _close_interval(self) -> None:
        self._pending = (self.progress.step, self.progress.totals)
        self.progress.totals = self._devices.replicate(metrics.empty())

    def _record(self) -> None:
        """Fetches and writes the record of the pending interval, if any."""
        if self._pending is None:
            return
        (step, totals), self._pending = self._pending, None
        record: dict[str, Any] = metrics.summarize(totals) | self._train.counts(step)
        self.progress.tokens_seen += record["tokens"]
        record |= {"tokens_seen": self.progress.tokens_seen} | self._clock.lap()
        if "step_time" in record:
            # The clock may cover other steps than the interval: the first step is not timed.
            tokens_per_step = record["tokens"] / float(totals.steps)
            record["tokens_per_second"] = tokens_per_step / record["step_time"]
            if self._outputs.flops_per_step is not None:
                rate = self._outputs.flops_per_step / record["step_time"]
                record["model_flops_per_second"] = rate * self._mean_batch(step, totals)
        # Of the first local device; None on backends without statistics.
        stats = jax.local_devices()[0].memory_stats() or {}
        record |= {name: stats[key] for key, name in _MEMORY.items() if key in stats}
        self._write(step, record)
        self._check_skipped(record["skipped_in_a_row"])

    def _mean_batch(self, step: int, totals: metrics.Totals) -> float:
        """The mean size of the batches of an interval, as a share of the full size."""
        sizes, num_steps = self._cfg.batch_sizes, int(totals.steps)
        sequences = sizes.before(step) - sizes.before(step - num_steps)
        return sequences / (num_steps * sizes.full)

    def _write(self, step: int, record: dict[str, Any]) -> None:
        for writer in self._outputs.writers:
            writer.write(step, record)

    def _evaluate_if_due(self) -> None:
        every, step = self._cfg.train.eval_every, self.progress.step
        if every and step and step % every == 0:
            self._evaluate()

    def _evaluate(self) -> None:
        """Evaluates once per step at most; a stop request defers it until the run is resumed."""
        progress = self.progress
        if not self._held_out or (progress.evaluation or {}).get("step") == progress.step:
            return
        self._record()  # first, so that records are in the order of their steps
        with self._clock.measure("pause"):
            results = [
                self._program.evaluate(
                    self.state.params, examples, lambda: self._stop.requested, name
                )
                for name, examples in self._held_out.items()
            ]
        evaluation: dict[str, Any] = {}
        for result in results:
            if result is None:  # stopped
                return
            evaluation |= result
        self._write(progress.step, evaluation)
        progress.evaluation = {"step": progress.step} | evaluation

    def _save(self) -> None:
        self._record()
        # A diverged state must not replace the good checkpoints.
        self._check_skipped(int(self.state.guard.skipped))
        data = self.progress.to_json() | {"data": self._train.description}
        with self._clock.measure("pause"):
            self._outputs.checkpoints.save(self.progress.step, self.state, data, to_dict(self._cfg))
        self._saved_at = time.monotonic()

    def _check_skipped(self, num_skipped: int) -> None:
        """Dumps a new series of skipped updates; raises DivergedError if it is too long."""
        if num_skipped == 0:
            return
        limit, guard = self._cfg.train.max_consecutive_skips, self.state.guard
        first, run_dir = int(guard.first.step), self._outputs.run_dir
        if num_skipped >= limit or first != self._dumped:
            progress = self.progress.to_json() | {"data": self._train.description}
            arguments = run_dir, self._cfg, self.state, progress, self._train, self._program.given
            with extra("the dump of a skipped step"):
                dump.write(*arguments)
            self._dumped = first
        if num_skipped < limit:
            return
        saved = latest_step(run_dir)
        raise DivergedError(
            f"{limit} consecutive updates were skipped from step {first} on, because the loss or "
            "gradient was not finite or the gradient norm was far above its average of "
            f"{float(guard.ema_grad_norm):.3g}; lower train.lr in a new run, or resume this one to "
            "repeat the same batches from "
            f"{'the beginning' if saved is None else f'step {saved}'}; "
            f"`xlstm-jax replay {run_dir / rundir.DIVERGED}` recomputes step {first}."
        )
