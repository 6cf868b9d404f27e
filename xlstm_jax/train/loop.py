"""A run from its config to its end, through as many interruptions as there are."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.compilation_cache import compilation_cache

from xlstm_jax.config import ConfigError, differences
from xlstm_jax.data import Examples, Windows, loader
from xlstm_jax.modules import LM
from xlstm_jax.sharding import Devices, make_devices
from xlstm_jax.train import plots, rundir
from xlstm_jax.train.checkpoint import (
    Checkpointer,
    has_params_alone,
    restore_latest,
    restore_params,
)
from xlstm_jax.train.config import ExperimentConfig, check_lengths, check_vocabulary
from xlstm_jax.train.optimizer import make_optimizer
from xlstm_jax.train.position import Position
from xlstm_jax.train.processes import log, process_log, wait_for_all
from xlstm_jax.train.run import Run
from xlstm_jax.train.signals import SharedStop, StopRequest
from xlstm_jax.train.state import TrainState, first_state, init_state
from xlstm_jax.train.writers import CallbackWriter, ConsoleWriter, JsonlWriter, Writer

OnMetrics = Callable[[int, dict[str, Any]], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitResult:
    """How a call of `fit` ended."""

    state: TrainState
    step: int
    finished: bool  # False: it was asked to stop, and what it did is saved
    evaluation: dict[str, Any] | None  # the last one, with its step


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
        flops_per_step: of the model, forward and backward; adds their rate to the records.
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
    devices = make_devices(cfg.mesh)
    check_lengths(cfg, devices.rules, devices.mesh.shape)
    train, valid = _load(cfg)
    state, position = _start(cfg, run_dir, train, fresh, devices)
    # Only from here on the disk changes.
    _begin(cfg, run_dir, fresh, _facts(state, train, valid), position.step)
    with contextlib.ExitStack() as stack:
        stack.enter_context(process_log(run_dir))
        log.info("begins at step %d of %d", position.step, cfg.train.steps)
        writers = _writers(cfg, run_dir, position.step, console, on_metrics)
        for writer in writers:
            stack.callback(writer.close)
        stack.enter_context(compiled_programs(run_dir / rundir.CACHE))
        alone = jax.process_count() == 1
        stop = stack.enter_context(StopRequest()) if alone else SharedStop()
        stack.enter_context(devices.active())
        run = Run(
            cfg,
            run_dir,
            state=state,
            position=position,
            train=train,
            valid=valid,
            writers=writers,
            checkpoints=stack.enter_context(Checkpointer(run_dir, cfg.train.keep)),
            stop=stop,
            devices=devices,
            flops_per_step=flops_per_step,
        )
        run.go()
        log.info("ends at step %d of %d", position.step, cfg.train.steps)
    finished = position.step == cfg.train.steps
    if finished and _writes():
        _draw(cfg, run_dir, train)
    return FitResult(
        state=run.state, step=position.step, finished=finished, evaluation=position.evaluation
    )


def _writes() -> bool:
    """Whether this process writes; the others only their shares of checkpoints, and a log."""
    return jax.process_index() == 0


def _load(cfg: ExperimentConfig) -> tuple[Examples, Examples | None]:
    """Rows to train on, and held-out ones where they are asked for."""
    train = loader.load(cfg.data, "train")
    valid = loader.load(cfg.data, "valid") if cfg.train.eval_every else None
    check_vocabulary(cfg, train)
    loader.batch_at(train, cfg.data, 0)  # raises if the data are too few for a batch
    return train, valid


def _begin(
    cfg: ExperimentConfig, run_dir: Path, fresh: bool, facts: dict[str, Any], step: int
) -> None:
    """The directory made ready by one process, while the others wait."""
    wait_for_all("before the run begins")
    if _writes():
        if fresh:
            rundir.discard(run_dir)
        rundir.begin(run_dir, cfg, facts, step)
    wait_for_all("the run has begun")


def _writers(
    cfg: ExperimentConfig, run_dir: Path, step: int, console: bool, on_metrics: OnMetrics | None
) -> list[Writer]:
    """What takes the records; of several processes the first one alone writes and shows them."""
    writers: list[Writer] = []
    if _writes():
        writers.append(JsonlWriter(run_dir / rundir.METRICS))
        writers += [ConsoleWriter(cfg.train.steps, step)] if console else []
    return writers + ([] if on_metrics is None else [CallbackWriter(on_metrics)])


def _draw(cfg: ExperimentConfig, run_dir: Path, train: Examples) -> None:
    bytes_per_token = train.bytes_per_token if isinstance(train, Windows) else None
    records = rundir.read_metrics(run_dir / rundir.METRICS)
    plots.loss_curve(records, run_dir / rundir.CURVE, cfg.name, bytes_per_token)


def _start(
    cfg: ExperimentConfig, run_dir: Path, train: Examples, fresh: bool, devices: Devices
) -> tuple[TrainState, Position]:
    """The newest state of the run, or the first one; each part of it where it belongs."""
    model, tx = LM(cfg.model), make_optimizer(cfg.train)
    key, tokens = jax.random.key(cfg.train.seed), jnp.zeros((1, 1), jnp.int32)
    restored = None
    if not fresh and has_params_alone(run_dir):
        _, params = restore_params(run_dir, place=devices.of_tree)
        like = jax.eval_shape(lambda params: first_state(params, tx), params)
        make = jax.jit(lambda params: first_state(params, tx), out_shardings=devices.of_tree(like))
        return make(params), Position()
    if not fresh:
        like = jax.eval_shape(lambda: init_state(model, tx, key, tokens))
        restored = restore_latest(run_dir, like, place=devices.of_tree)
    if restored is None:
        return init_state(model, tx, key, tokens, devices=devices), Position()
    state, values = restored
    lines = differences(train.description, values.pop("data"))
    if lines:
        raise ConfigError(
            f"run_dir={str(run_dir)!r} was trained on other data ({'; '.join(lines)}); bring that "
            "data back, use another directory, or fresh=True (--fresh) to discard that run."
        )
    return state, Position.from_json(values)


def _facts(state: TrainState, train: Examples, valid: Examples | None) -> dict[str, Any]:
    data = {"train": train.description}
    if valid is not None:
        data["valid"] = valid.description
    num_params = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    return {"num_params": num_params, "data": data}


@contextlib.contextmanager
def compiled_programs(folder: Path) -> Iterator[None]:
    """Keeps compiled programs in `folder`, for the next start, unless the user has another place.

    The place is global to the process: it is given back at the end.
    """
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        yield
        return
    jax.config.update("jax_compilation_cache_dir", str(folder.resolve()))
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()
