"""The loop of a run, and what it touches on the host."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from xlstm_jax.config import to_dict
from xlstm_jax.data import Batch, Examples, loader
from xlstm_jax.modules import LM
from xlstm_jax.sharding import Devices, use_rules
from xlstm_jax.train import heldout, metrics, rundir
from xlstm_jax.train.checkpoint import Checkpointer, latest_step
from xlstm_jax.train.clock import Clock
from xlstm_jax.train.config import ExperimentConfig
from xlstm_jax.train.guard import DivergedError
from xlstm_jax.train.optimizer import make_optimizer
from xlstm_jax.train.position import Position
from xlstm_jax.train.signals import Stop
from xlstm_jax.train.state import TrainState
from xlstm_jax.train.step import make_train_step
from xlstm_jax.train.writers import Writer


class Run:
    """Steps, records, evaluations and checkpoints, each when it is due.

    Metrics stay on the device for a whole interval and are fetched while the step after it runs, so
    logging never leaves the device idle.

    Args:
        cfg: the whole run.
        run_dir: its directory.
        state: before the next step; donated to it.
        position: where that is; kept up to date.
        train: rows to train on.
        valid: held-out rows, if any.
        writers: take the records.
        checkpoints: takes the states.
        stop: by which somebody may ask to stop.
        devices: where everything lies; active for as long as the run goes.
        flops_per_step: of the model; None leaves the rate out of the records.
    """

    def __init__(
        self,
        cfg: ExperimentConfig,
        run_dir: Path,
        *,
        state: TrainState,
        position: Position,
        train: Examples,
        valid: Examples | None,
        writers: Sequence[Writer],
        checkpoints: Checkpointer,
        stop: Stop,
        devices: Devices,
        flops_per_step: float | None = None,
    ):
        self.state, self.position = state, position
        self._cfg, self._run_dir, self._train, self._writers = cfg, run_dir, train, writers
        self._checkpoints, self._stop, self._flops = checkpoints, stop, flops_per_step
        self._devices = devices
        model = LM(cfg.model)
        self._evaluate_params = (
            None
            if valid is None
            else heldout.make_evaluate(model, valid, cfg.data, cfg.train, devices)
        )
        self._step_fn = _make_step(model, cfg, devices)
        self._clock = Clock()
        self._complete: tuple[int, metrics.Totals] | None = None  # an interval not yet fetched
        self._saved_at = time.monotonic()

    def go(self) -> None:
        """Steps until the last one or until asked to stop; saves in either case."""
        cfg, position = self._cfg.train, self.position
        steps_left = cfg.steps - position.step
        share = self._devices.share_of_rows(self._cfg.data.batch_size)
        with loader.batches(
            self._train,
            self._cfg.data,
            position.step,
            steps_left,
            host_index=share.index,
            host_count=share.count,
        ) as batches:
            self._evaluate_if_due()  # where the run was cut, if it was cut before that
            while position.step < cfg.steps and not self._stop.at(position.step):
                with self._clock.waiting():
                    batch = next(batches)
                self._step(batch)
                self._after_step()
        self._record()
        if position.step == cfg.steps:
            self._finish()
        self._save()

    def _step(self, batch: Batch) -> None:
        position = self.position
        batch = self._devices.batch(batch, self._cfg.data.batch_size)
        self.state, position.totals = self._step_fn(self.state, position.totals, batch)
        position.step += 1
        if self._clock.running:
            self._clock.step()
        else:
            # The first step compiled the program; the clock begins when it is over.
            jax.block_until_ready(position.totals)
            self._clock.start()
        self._record()

    def _after_step(self) -> None:
        cfg, step = self._cfg.train, self.position.step
        if step % cfg.log_every == 0:
            self._close_interval()
        self._evaluate_if_due()
        by_step = cfg.checkpoint_every and step % cfg.checkpoint_every == 0
        if by_step or self._is_due_by_clock(step):
            self._save()

    def _is_due_by_clock(self, step: int) -> bool:
        cfg = self._cfg.train
        minutes = (time.monotonic() - self._saved_at) / 60
        due = cfg.checkpoint_minutes > 0 and minutes >= cfg.checkpoint_minutes
        if jax.process_count() == 1 or cfg.checkpoint_minutes == 0:
            return due
        # The clock of the first process counts, and is asked for now and then.
        return step % cfg.log_every == 0 and bool(multihost_utils.broadcast_one_to_all(due))

    def _finish(self) -> None:
        """Records what is left of an interval, and the final held-out loss."""
        if float(self.position.totals.steps) > 0:
            self._close_interval()
        self._evaluate()

    def _close_interval(self) -> None:
        self._complete = (self.position.step, self.position.totals)
        self.position.totals = metrics.empty()

    def _record(self) -> None:
        """Fetches and writes the interval that is complete, if any."""
        if self._complete is None:
            return
        (step, totals), self._complete = self._complete, None
        record = metrics.summarise(totals)
        self.position.tokens_seen += int(record["tokens"] or 0)
        self._write(
            step,
            record
            | {"tokens_seen": self.position.tokens_seen}
            | self._speed(float(record["tokens"] or 0) / float(totals.steps))
            | _memory(),
        )
        if (record["skipped_in_a_row"] or 0) >= self._cfg.train.max_consecutive_skips:
            self._diverged()

    def _speed(self, tokens_per_step: float) -> dict[str, float]:
        lap = self._clock.lap()
        if lap:
            lap["tokens_per_second"] = tokens_per_step / lap["step_time"]
            if self._flops is not None:
                lap["model_flops_per_second"] = self._flops / lap["step_time"]
        return lap

    def _write(self, step: int, record: dict[str, Any]) -> None:
        for writer in self._writers:
            writer.write(step, record)

    def _evaluate_if_due(self) -> None:
        every, step = self._cfg.train.eval_every, self.position.step
        if every and step and step % every == 0:
            self._evaluate()

    def _evaluate(self) -> None:
        """Once per step at most; a run that is to stop does it when it goes on."""
        position = self.position
        done = position.evaluation is not None and position.evaluation["step"] == position.step
        if self._evaluate_params is None or done:
            return
        self._record()
        with self._clock.paused():
            found = self._evaluate_params(self.state.params, lambda: self._stop.requested)
        if found is not None:
            self._write(position.step, found)
            position.evaluation = {"step": position.step} | found

    def _save(self) -> None:
        self._record()
        if int(self.state.guard.skipped) >= self._cfg.train.max_consecutive_skips:
            self._diverged()
        data = self.position.to_json() | {"data": self._train.description}
        with self._clock.paused():
            self._checkpoints.save(self.position.step, self.state, data, to_dict(self._cfg))
        self._saved_at = time.monotonic()

    def _diverged(self) -> None:
        """Ends the run, naming the rows it could not learn from."""
        limit, guard = self._cfg.train.max_consecutive_skips, self.state.guard
        first = self.position.step - int(guard.skipped)
        rows = {
            str(step): loader.batch_at(self._train, self._cfg.data, step).index.tolist()
            for step in range(first, first + limit)
        }
        usual = float(guard.usual_norm)
        dump = {"first_skipped_step": first, "usual_grad_norm": usual, "rows_of_step": rows}
        rundir.write_json(self._run_dir / rundir.DIVERGED, dump)
        saved = latest_step(self._run_dir)
        raise DivergedError(
            f"{limit} updates in a row were discarded from step {first} on, as their loss or "
            "gradient was not finite or the gradient's norm was far above the usual "
            f"{usual:.3g}; lower train.lr in a new run, or resume this one to meet the same "
            f"batches again from {'the beginning' if saved is None else f'step {saved}'}."
        )


def _make_step(
    model: Any, cfg: ExperimentConfig, devices: Devices
) -> Callable[..., tuple[TrainState, Any]]:
    step_fn = make_train_step(model, make_optimizer(cfg.train), cfg.train)

    def step_and_count(state: TrainState, totals: metrics.Totals, batch: Batch):
        with use_rules(devices.rules):
            state, found = step_fn(state, batch)
        return devices.hold(state), metrics.add(totals, found)

    return jax.jit(step_and_count, donate_argnums=(0, 1))


def _memory() -> dict[str, int]:
    """Bytes in use on the first device, where its backend tells."""
    stats = jax.local_devices()[0].memory_stats() or {}
    names = {"bytes_in_use": "memory_in_use", "peak_bytes_in_use": "memory_peak"}
    return {ours: stats[theirs] for theirs, ours in names.items() if theirs in stats}
