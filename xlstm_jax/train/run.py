"""`fit`: starts or resumes a run and trains it to its last step."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import optax

from xlstm_jax.config import ConfigError
from xlstm_jax.data import loader
from xlstm_jax.data.batch import Examples, differences_of_data
from xlstm_jax.data.mixture import check_tokenizers
from xlstm_jax.data.stream import Stream
from xlstm_jax.program_cache import compiled_programs
from xlstm_jax.sharding.devices import make_devices
from xlstm_jax.train import checkpoint, lock, plots, rundir
from xlstm_jax.train.batches import GivenBatches, TrainBatches
from xlstm_jax.train.config import ExperimentConfig, check_divisibility, check_vocabulary
from xlstm_jax.train.loop import Loop, Outputs, Progress
from xlstm_jax.train.processes import Stop, extra, log, process_log, sync_processes
from xlstm_jax.train.program import TrainProgram
from xlstm_jax.train.state import TrainState
from xlstm_jax.train.writers import CallbackWriter, ConsoleWriter, JsonlWriter, Writer


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitResult:
    """The result of `fit`."""

    state: TrainState
    step: int
    finished: bool  # False after a stop request; the run is saved and can be resumed
    evaluation: dict[str, Any] | None  # the last evaluation, with its step


def fit(
    cfg: ExperimentConfig,
    run_dir: str | Path,
    *,
    data: Any = None,
    tx: optax.GradientTransformation | None = None,
    fresh: bool = False,
    console: bool = False,
    flops_per_step: float | None = None,
    on_metrics: Callable[[int, dict[str, Any]], None] | None = None,
) -> FitResult:
    """Trains until step `cfg.train.steps`, resuming the run in `run_dir` if one exists.

    A run that is interrupted and resumed gives bit-identical results to an uninterrupted one. On
    the first SIGINT or SIGTERM after the first step, the current step finishes, a checkpoint is
    saved, and `fit` returns. An earlier signal, when there is nothing to save, and a second one
    have their usual effect.

    Args:
        run_dir: directory of checkpoints, config.json, run.json, metrics.jsonl and loss.png.
        data: training batches in place of those of `cfg.data`: a `grain.MapDataset` whose element
            `step` is the `Batch` of that step, or an iterable of `Batch` from step 0 on. All
            processes get the whole batch. `cfg.data` describes the held-out data.
        tx: any optax transformation in place of the optimizer of `cfg.train`. It has its own
            learning rate, and a resumed run needs the same `tx` again.
        fresh: discard an existing run in `run_dir`.
        console: show progress on standard output.
        flops_per_step: of the model, forward and backward; adds the FLOP rate to the records.
        on_metrics: called with each record after it is written.

    Raises:
        ConfigError: the config is invalid, `run_dir` belongs to another config, or another process
            trains in it; nothing on disk has changed.
        CheckpointError: the checkpoint cannot be read; nothing on disk has changed.
        DivergedError: `max_consecutive_skips` consecutive updates were skipped.
        OSError: the disk is full or failed; the last complete checkpoint is intact.
    """
    run_dir = rundir.expand(run_dir)
    rundir.check_folder(run_dir)
    with lock.hold(run_dir):
        if fresh:
            rundir.check_fresh(run_dir)
        else:
            rundir.check(run_dir, cfg)
        return _fit(
            cfg,
            run_dir,
            data=data,
            tx=tx,
            fresh=fresh,
            console=console,
            flops_per_step=flops_per_step,
            on_metrics=on_metrics,
        )


def _fit(
    cfg: ExperimentConfig,
    run_dir: Path,
    *,
    data: Any,
    tx: optax.GradientTransformation | None,
    fresh: bool,
    console: bool,
    flops_per_step: float | None,
    on_metrics: Callable[[int, dict[str, Any]], None] | None,
) -> FitResult:
    """`fit` in a directory that is checked and locked."""
    devices = make_devices(cfg.mesh)
    check_divisibility(cfg, devices.rules, devices.mesh.shape)
    train = _stream(cfg) if data is None else GivenBatches(data, cfg)
    held_out: dict[str, Examples] = {}
    if cfg.train.eval_every:
        held_out = {"valid": loader.load(cfg.data, "valid"), **loader.load_eval_sets(cfg.data)}
    for examples in held_out.values():
        check_vocabulary(cfg, examples)
    check_tokenizers("data.eval_sets", held_out)
    program = TrainProgram(cfg, devices, tx)
    resumed = None if fresh else _resume(program, run_dir, train)
    state, progress = resumed or (program.init(), Progress())
    train = train.skip(progress.skips)
    facts = {
        "num_params": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "data": {"train": train.description}
        | {name: examples.description for name, examples in held_out.items()},
    }
    # Everything above may raise; from here on the disk changes. The first process prepares the
    # directory while the others wait. They write only a log and their shards of checkpoints.
    is_first = jax.process_index() == 0
    sync_processes("before the run directory is prepared")
    if is_first:
        if fresh:
            rundir.discard(run_dir)
        rundir.prepare(run_dir, cfg, facts, progress.step)
        for examples in (getattr(train, "examples", None), *held_out.values()):
            if (tokenizer := getattr(examples, "tokenizer", None)) is not None:
                tokenizer.save(run_dir / rundir.TOKENIZER)
                break
    sync_processes("the run directory is prepared")
    writers: list[Writer] = [JsonlWriter(run_dir / rundir.METRICS)] if is_first else []
    writers += [ConsoleWriter(cfg.train.steps, progress.step)] if is_first and console else []
    if on_metrics is not None:
        writers.append(CallbackWriter(on_metrics))
    outputs = Outputs(
        run_dir=run_dir,
        writers=writers,
        checkpoints=checkpoint.Checkpointer(run_dir, cfg.train.keep),
        flops_per_step=flops_per_step,
    )
    with (
        process_log(run_dir),
        compiled_programs(),
        contextlib.closing(Stop()) as stop,
    ):
        log.info("starts at step %d of %d", progress.step, cfg.train.steps)
        with outputs, devices.active():
            resume = functools.partial(_resume, program, run_dir, train)
            loop = Loop(program, state, progress, train, held_out, outputs, stop, resume)
            loop.run()
        log.info("ends at step %d of %d", progress.step, cfg.train.steps)
        finished = progress.step == cfg.train.steps
        if finished and is_first:
            with extra(f"the picture {rundir.CURVE}"):
                records = rundir.read_metrics(run_dir / rundir.METRICS)
                plots.loss_curve(records, run_dir / rundir.CURVE, cfg.name)
    return FitResult(
        state=loop.state, step=progress.step, finished=finished, evaluation=progress.evaluation
    )


def _stream(cfg: ExperimentConfig) -> Stream:
    """The training batches that a config describes."""
    examples = loader.load(cfg.data, "train")
    check_vocabulary(cfg, examples)
    return Stream(examples, cfg.data, cfg.batch_sizes)


def _resume(
    program: TrainProgram, run_dir: Path, train: TrainBatches
) -> tuple[TrainState, Progress] | None:
    """The newest state of the run, sharded over its devices, and its progress; None if unsaved."""
    if checkpoint.has_params_only(run_dir):
        _, params = checkpoint.restore_params(run_dir, place=program.devices.shardings)
        return program.init_from(params), Progress()
    restored = checkpoint.restore_latest(run_dir, program.arguments[0])
    if restored is None:
        return None
    state, values = restored
    progress, description = Progress.from_json(values)
    # Resuming is exact only if step i has the same batch as before.
    if lines := differences_of_data(train.description, description):
        raise ConfigError(
            f"run_dir={str(run_dir)!r} was trained on other data ({'; '.join(lines)}); restore "
            "those data or give their path as data.source, use another directory, or fresh=True "
            "(--fresh) to discard that run."
        )
    return state, progress
