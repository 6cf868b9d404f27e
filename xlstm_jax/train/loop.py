"""A run from its config to its end, through as many interruptions as there are."""

import dataclasses
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from xlstm_jax.config import ConfigError, differences, to_dict
from xlstm_jax.data import Batch, Examples, Windows, loader
from xlstm_jax.modules import LM
from xlstm_jax.train import checkpoint, heldout, metrics, plots, rundir, writers
from xlstm_jax.train.clock import Clock
from xlstm_jax.train.config import ExperimentConfig, check_vocabulary
from xlstm_jax.train.guard import DivergedError
from xlstm_jax.train.optimizer import make_optimizer
from xlstm_jax.train.signals import StopRequest
from xlstm_jax.train.state import TrainState, init_state
from xlstm_jax.train.step import make_train_step

_log = logging.getLogger(__name__)

OnMetrics = Callable[[int, dict[str, Any]], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitResult:
    """How a call of `fit` ended."""

    state: TrainState
    step: int
    finished: bool  # False: it was asked to stop, and what it did is saved
    evaluation: dict[str, Any] | None  # the last one, with its step


@dataclasses.dataclass(kw_only=True)
class Position:
    """Where a run stands, apart from its state; saved with it, so that a cut leaves no trace."""

    step: int = 0
    tokens_seen: int = 0  # up to the last record
    totals: metrics.Totals = dataclasses.field(default_factory=metrics.empty)  # since then
    evaluation: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """For a checkpoint."""
        return vars(self) | {"totals": metrics.to_json(self.totals)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Position":
        """The inverse of `to_json`."""
        return cls(**values | {"totals": metrics.from_json(values["totals"])})


def fit(
    cfg: ExperimentConfig,
    run_dir: str | Path,
    *,
    fresh: bool = False,
    console: bool = False,
    flops_per_step: float | None = None,
    on_metrics: OnMetrics | None = None,
) -> FitResult:
    """Trains until `cfg.train.steps`, going on with what `run_dir` holds.

    A run that was cut anywhere and resumed computes, bit for bit, what it would have computed. The
    first SIGINT or SIGTERM ends the step, saves, and returns; a second one acts as usual.

    Args:
        cfg: the whole run.
        run_dir: checkpoints, config.json, run.json, metrics.jsonl and loss.png go there.
        fresh: discard the run that is there.
        console: show progress on standard output.
        flops_per_step: of the model, forward and backward; adds a rate to the metrics.
        on_metrics: called with each record, after it was written.

    Raises:
        ConfigError: the config cannot be used, or the directory belongs to another one; then
            nothing on disk has changed.
        CheckpointError: what is there cannot be read; nothing on disk has changed.
        DivergedError: `max_consecutive_skips` updates in a row were discarded.
    """
    run_dir = Path(run_dir)
    if not fresh:
        rundir.check(run_dir, cfg)
    train = loader.load(cfg.data, "train")
    valid = loader.load(cfg.data, "valid") if cfg.train.eval_every else None
    check_vocabulary(cfg, train)
    loader.batch_at(train, cfg.data, 0)  # raises if the data are too few for the batch
    state, position = _start(cfg, run_dir, train, fresh)

    if fresh:
        rundir.discard(run_dir)
    facts = {
        "num_params": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "data": {"train": train.description} | ({"valid": valid.description} if valid else {}),
    }
    rundir.begin(run_dir, cfg, facts, position.step)
    outputs: list[writers.Writer] = [writers.JsonlWriter(run_dir / rundir.METRICS)]
    if console:
        outputs.append(writers.ConsoleWriter(cfg.train.steps, position.step))
    if on_metrics is not None:
        outputs.append(writers.CallbackWriter(on_metrics))
    try:
        with checkpoint.Checkpointer(run_dir, cfg.train.keep) as saver, StopRequest() as stop:
            run = _Run(cfg, run_dir, state, position, train, valid, outputs, saver, stop)
            run.flops_per_step = flops_per_step
            run.go()
    finally:
        for output in outputs:
            output.close()
    finished = position.step >= cfg.train.steps
    if finished:
        _draw(cfg, run_dir, train)
    return FitResult(
        state=run.state, step=position.step, finished=finished, evaluation=position.evaluation
    )


def _start(
    cfg: ExperimentConfig, run_dir: Path, train: Examples, fresh: bool
) -> tuple[TrainState, Position]:
    """The newest state of the run, or the first one."""
    model, tx = LM(cfg.model), make_optimizer(cfg.train)
    key, tokens = jax.random.key(cfg.train.seed), jnp.zeros((1, 1), jnp.int32)
    if not fresh:
        like = jax.eval_shape(lambda: init_state(model, tx, key, tokens))
        restored = checkpoint.restore_latest(run_dir, like)
        if restored is not None:
            state, values = restored
            lines = differences(train.description, values.pop("data"))
            if lines:
                raise ConfigError(
                    f"run_dir={str(run_dir)!r} was trained on other data ({'; '.join(lines)}); "
                    "bring that data back, or use another directory."
                )
            return state, Position.from_json(values)
    return init_state(model, tx, key, tokens), Position()


def _draw(cfg: ExperimentConfig, run_dir: Path, train: Examples) -> None:
    bytes_per_token = train.bytes_per_token if isinstance(train, Windows) else None
    records = rundir.read_metrics(run_dir / rundir.METRICS)
    plots.loss_curve(records, run_dir / rundir.CURVE, cfg.name, bytes_per_token)


class _Run:
    """The loop, and what it touches on the host."""

    flops_per_step: float | None = None

    def __init__(
        self,
        cfg: ExperimentConfig,
        run_dir: Path,
        state: TrainState,
        position: Position,
        train: Examples,
        valid: Examples | None,
        outputs: list[writers.Writer],
        saver: checkpoint.Checkpointer,
        stop: StopRequest,
    ):
        self.cfg, self.run_dir, self.state, self.position = cfg, run_dir, state, position
        self.train, self.outputs, self.saver, self.stop = train, outputs, saver, stop
        model = LM(cfg.model)
        self.evaluate = (
            None if valid is None else heldout.make_evaluate(model, valid, cfg.data, cfg.train)
        )
        step_fn = make_train_step(model, make_optimizer(cfg.train), cfg.train)

        def step_and_count(state: TrainState, totals: metrics.Totals, batch: Batch):
            state, found = step_fn(state, batch)
            return state, metrics.add(totals, found)

        self.step_fn = jax.jit(step_and_count, donate_argnums=(0, 1))
        self.clock = Clock()
        # The interval that is complete but not fetched: fetching at once would idle the device.
        self.pending: tuple[int, metrics.Totals] | None = None

    def go(self) -> None:
        """Steps until the last one or until asked to stop; saves at the end in either case."""
        cfg, position = self.cfg.train, self.position
        self.saved_at = time.monotonic()
        steps_left = cfg.steps - position.step
        with loader.batches(self.train, self.cfg.data, position.step, steps_left) as batches:
            while position.step < cfg.steps and not self.stop:
                with self.clock.waiting():
                    batch = next(batches)
                self._step(batch)
                self._after_step()
        self._flush()
        if not self.stop and float(position.totals.steps) > 0:
            self._close_interval()
            self._flush()
        if not self.stop:
            self._evaluate()
        self._save()

    def _step(self, batch: Batch) -> None:
        position = self.position
        self.state, position.totals = self.step_fn(self.state, position.totals, batch)
        position.step += 1
        if self.clock.running:
            self.clock.step()
        else:
            # The first step compiled the program; the clock begins when it is over.
            jax.block_until_ready(position.totals)
            self.clock.start()
        self._flush()

    def _after_step(self) -> None:
        cfg, step = self.cfg.train, self.position.step
        if step % cfg.log_every == 0:
            self._close_interval()
        if self.evaluate is not None and step % cfg.eval_every == 0:
            self._evaluate()
        minutes = (time.monotonic() - self.saved_at) / 60
        by_step = cfg.checkpoint_every and step % cfg.checkpoint_every == 0
        by_clock = cfg.checkpoint_minutes and minutes >= cfg.checkpoint_minutes
        if by_step or by_clock:
            self._save()

    def _close_interval(self) -> None:
        self.pending = (self.position.step, self.position.totals)
        self.position.totals = metrics.empty()

    def _flush(self) -> None:
        """Writes the interval that is complete, if any."""
        if self.pending is None:
            return
        (step, totals), self.pending = self.pending, None
        record: dict[str, Any] = metrics.summarise(totals)
        lap = self.clock.lap()
        if lap:
            lap["tokens_per_second"] = record["tokens"] / float(totals.steps) / lap["step_time"]
            if self.flops_per_step is not None:
                lap["model_flops_per_second"] = self.flops_per_step / lap["step_time"]
        self.position.tokens_seen += record["tokens"]
        self._write(step, record | {"tokens_seen": self.position.tokens_seen} | lap)
        if record["skipped_in_a_row"] >= self.cfg.train.max_consecutive_skips:
            self._diverged()

    def _write(self, step: int, record: dict[str, Any]) -> None:
        for output in self.outputs:
            output.write(step, record)

    def _evaluate(self) -> None:
        """Once per step at most; a run that is to stop evaluates when it goes on."""
        position = self.position
        done = position.evaluation is not None and position.evaluation["step"] == position.step
        if self.evaluate is None or done:
            return
        self._flush()
        with self.clock.paused():
            found = self.evaluate(self.state.params, lambda: bool(self.stop))
        if found is not None:
            self._write(position.step, found)
            position.evaluation = {"step": position.step} | found

    def _save(self) -> None:
        self._flush()
        if int(self.state.guard.skipped) >= self.cfg.train.max_consecutive_skips:
            self._diverged()
        data = self.position.to_json() | {"data": self.train.description}
        with self.clock.paused():
            self.saver.save(self.position.step, self.state, data, to_dict(self.cfg))
        self.saved_at = time.monotonic()

    def _diverged(self) -> None:
        """Ends the run, leaving what is needed to meet the same batches again."""
        count, limit = int(self.state.guard.skipped), self.cfg.train.max_consecutive_skips
        first = self.position.step - count
        rows = {
            str(step): loader.batch_at(self.train, self.cfg.data, step).index.tolist()
            for step in range(first, first + limit)
        }
        usual = float(self.state.guard.usual_norm)
        dump = {"first_skipped_step": first, "usual_grad_norm": usual, "rows_of_step": rows}
        rundir.write_json(self.run_dir / rundir.DIVERGED, dump)
        saved = checkpoint.latest_step(self.run_dir)
        raise DivergedError(
            f"{limit} updates in a row were discarded, the first at step {first}: their loss or "
            f"gradient was not finite, or its norm was far above the usual {usual:.3g}; lower "
            "train.lr in a new run, or resume this one, which meets the same batches again from "
            f"{'its beginning' if saved is None else f'step {saved}'}."
        )
