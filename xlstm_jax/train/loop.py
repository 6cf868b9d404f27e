"""The training loop: steps, metrics, evaluations and checkpoints."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

from xlstm_jax.config import to_dict
from xlstm_jax.data.batch import Batch
from xlstm_jax.train import dump, metrics, rewind, rundir
from xlstm_jax.train.batches import TrainBatches
from xlstm_jax.train.checkpoint import latest_step
from xlstm_jax.train.clock import Clock, Part
from xlstm_jax.train.evaluation import Evaluation
from xlstm_jax.train.guard import DivergedError
from xlstm_jax.train.outputs import Outputs
from xlstm_jax.train.processes import Stop, extra
from xlstm_jax.train.program import TrainProgram
from xlstm_jax.train.progress import Progress
from xlstm_jax.train.rates import Rates
from xlstm_jax.train.state import TrainState, eval_params
from xlstm_jax.train.watch import Watch
from xlstm_jax.typing import PyTree

# Key of JAX -> key of a record.
_MEMORY = {"bytes_in_use": "memory_in_use", "peak_bytes_in_use": "memory_peak"}


class Loop:
    """Runs steps, and writes records, evaluations and checkpoints when they are due.

    Metrics accumulate on the device for one interval and are fetched while the next step runs, so
    logging does not leave the device idle.

    The devices of `program` must be active. `state` is donated to the first step, and `progress` is
    updated in place. `clock` was made when the run began. `resume` restores the newest checkpoint.
    """

    def __init__(
        self,
        program: TrainProgram,
        state: TrainState,
        progress: Progress,
        train: TrainBatches,
        evaluation: Evaluation,
        outputs: Outputs,
        stop: Stop,
        rates: Rates,
        clock: Clock,
        resume: Callable[[], tuple[TrainState, Progress] | None],
    ):
        self.state, self.progress = state, progress
        progress.totals = program.devices.replicate(progress.totals)
        self._program, self._cfg, self._devices = program, program.cfg, program.devices
        self._train, self._evaluation, self._outputs, self._stop = train, evaluation, outputs, stop
        self._rates, self._clock, self._watch = rates, clock, Watch(program)
        self._sizes: set[int] = set()  # of batches; each compiles the step
        self._pending: tuple[int, metrics.Totals] | None = None  # a complete interval to fetch
        self._watched: tuple[int, PyTree] | None = None  # statistics to fetch
        self._saved_at, self._saved_step = time.monotonic(), progress.step
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
                with self._clock.measure("restore"):
                    self._rewind(error)

    def _rewind(self, error: DivergedError) -> None:
        """Returns to a checkpoint before the spike; raises the error if no rewinds are left."""
        skips, run_dir = self.progress.skips, self._outputs.run_dir
        first = int(self.state.guard.first.step)
        skip = rewind.next_skip(run_dir, self._cfg.train, first, skips)
        if skip is None:
            raise error
        rewind.discard_after(run_dir, self._outputs.checkpoints, skip)
        del self.state  # memory may not suffice for two states
        self._pending = self._watched = None
        resumed = self._resume()
        assert resumed is not None
        self.state, progress = resumed
        totals = self._devices.replicate(progress.totals)
        vars(self.progress).update(vars(progress), totals=totals, skips=[*skips, skip])
        self._saved_step = progress.step
        self._train = self._train.skip(self.progress.skips)

    def _run(self) -> None:
        cfg, progress = self._cfg.train, self.progress
        sizes = self._cfg.batch_sizes
        share = self._devices.share_of_batch(self._cfg.data.batch_size)
        hosts = dict(host_index=share.index, host_count=share.count)
        with self._train.batches(progress.step, cfg.steps - progress.step, **hosts) as batches:
            self._clock.ready()
            # A run that was stopped during an evaluation repeats it when it is resumed.
            self._evaluate()
            while progress.step < cfg.steps and not self._stop.at(progress.step):
                with self._clock.measure("wait"):
                    batch = next(batches)
                batch = self._devices.batch(batch, sizes.at(progress.step))
                with self._outputs.profiler.step(progress.step), self._compiling(batch):
                    self.state, progress.totals = self._program.step(
                        self.state, progress.totals, batch
                    )
                progress.step += 1
                # After the dispatch: the device computes this step while the host waits for the
                # totals of the interval before it.
                self._record()
                if progress.step % cfg.log_every == 0:
                    self._close_interval()
                if self._watch.is_due(progress.step):
                    self._dispatch_statistics(batch)
                if self._outputs.profiler.is_due(progress.step):
                    with self._pause("save"):
                        self._outputs.profiler.stop()
                self._evaluate()
                if self._is_checkpoint_due():
                    self._save()
        self._record()
        if progress.step == cfg.steps:
            if float(progress.totals.steps) > 0:  # the last interval may be shorter
                self._close_interval()
            self._evaluate(is_last=True)
        self._save(is_last=True)

    @contextlib.contextmanager
    def _compiling(self, batch: Batch) -> Iterator[None]:
        """Times the dispatch of a step as compilation if it is the first of its batch size."""
        size = len(batch.inputs)
        if size in self._sizes:
            yield
            self._clock.step()
            return
        self._sizes.add(size)
        with self._pause("compile"):
            yield
            jax.block_until_ready(self.state.step)
        if not self._clock.running:
            self._clock.start()
            self._stop.listen()  # from here on a stop can save a checkpoint

    @contextlib.contextmanager
    def _pause(self, part: Part) -> Iterator[None]:
        """Times its body as a part of the run other than steps."""
        jax.block_until_ready(self.state.step)  # the step in progress is not part of it
        with self._clock.measure(part):
            yield

    def _dispatch_statistics(self, batch: Batch) -> None:
        if self._watch.is_compiled(batch):
            self._watched = self.progress.step, self._watch.dispatch(self.state, batch)
            return
        with self._pause("compile"):
            statistics = self._watch.dispatch(self.state, batch)
            self._watched = self.progress.step, jax.block_until_ready(statistics)

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
        """Fetches and writes the record of the pending interval, and pending statistics, if any."""
        pending, self._pending = self._pending, None
        if pending is not None:
            self._record_interval(*pending)
        watched, self._watched = self._watched, None
        if watched is not None:
            step, statistics = watched
            if record := self._watch.record(statistics):
                self._outputs.write(step, record)

    def _record_interval(self, step: int, totals: metrics.Totals) -> None:
        record: dict[str, Any] = metrics.summarize(totals) | self._train.counts(step)
        self.progress.tokens_seen += record["tokens"]
        record |= {"tokens_seen": self.progress.tokens_seen} | self._clock.lap()
        if "step_time" in record:
            # The clock may cover other steps than the interval: the first step is not timed.
            tokens_per_step = record["tokens"] / float(totals.steps)
            share = self._mean_batch(step, totals)
            record |= self._rates.at(record["step_time"], tokens_per_step, share)
        record["goodput"] = self._clock.goodput()
        # Of the first local device; None on backends without statistics.
        stats = jax.local_devices()[0].memory_stats() or {}
        record |= {name: stats[key] for key, name in _MEMORY.items() if key in stats}
        self._outputs.write(step, record)
        self._check_skipped(record["skipped_in_a_row"])

    def _mean_batch(self, step: int, totals: metrics.Totals) -> float:
        """The mean size of the batches of an interval, as a share of the full size."""
        sizes, num_steps = self._cfg.batch_sizes, int(totals.steps)
        sequences = sizes.before(step) - sizes.before(step - num_steps)
        return sequences / (num_steps * sizes.full)

    def _evaluate(self, *, is_last: bool = False) -> None:
        if not self._evaluation.is_due(is_last=is_last):
            return
        self._record()  # first, so that records are in the order of their steps
        with self._pause("evaluate"):
            for record in self._evaluation.run(self._eval_params(), is_last=is_last):
                self._outputs.write(self.progress.step, record)

    def _eval_params(self) -> PyTree:
        return eval_params(self._cfg, self.state.params, self.state.opt_state)

    def _save(self, *, is_last: bool = False) -> None:
        """Saves a checkpoint, and what is written beside it; `is_last`: the run ends or stops."""
        self._record()
        # A diverged state must not replace the good checkpoints.
        self._check_skipped(int(self.state.guard.skipped))
        progress, cfg = self.progress, self._cfg.train
        progress.checkpoints += progress.step != self._saved_step
        data = progress.to_json() | {"data": self._train.description}
        with self._pause("save"):
            self._outputs.checkpoints.save(progress.step, self.state, data, to_dict(self._cfg))
            self._outputs.picture(progress.step)
            is_finished = is_last and progress.step == cfg.steps
            # Not when the run is stopped, which must be quick.
            is_due = not is_last and progress.checkpoints % max(1, cfg.export_every) == 0
            if (is_finished or is_due) and self._outputs.exporter is not None:
                self._outputs.export(progress.step, self._eval_params())
        self._saved_at, self._saved_step = time.monotonic(), progress.step

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
