"""`fit`: starts or resumes a run and trains it to its last step."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import optax

from xlstm_jax.config import ConfigError
from xlstm_jax.data.batch import differences_of_data
from xlstm_jax.program_cache import compiled_programs
from xlstm_jax.sharding.devices import make_devices
from xlstm_jax.train import checkpoint, initial, lock, plots, rundir, setup
from xlstm_jax.train.batches import TrainBatches
from xlstm_jax.train.clock import Clock
from xlstm_jax.train.config import ExperimentConfig, check_divisibility
from xlstm_jax.train.evaluation import Evaluation
from xlstm_jax.train.evaluators import Evaluator, check_evaluators
from xlstm_jax.train.loop import Loop
from xlstm_jax.train.outputs import Exporter
from xlstm_jax.train.processes import Stop, extra, log, process_log
from xlstm_jax.train.program import TrainProgram
from xlstm_jax.train.progress import Progress
from xlstm_jax.train.rates import Rates
from xlstm_jax.train.state import TrainState
from xlstm_jax.train.step import LossFn
from xlstm_jax.train.writers import Writer


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
    loss_fn: LossFn | None = None,
    evaluators: Sequence[Evaluator] = (),
    writers: Sequence[Writer] = (),
    fresh: bool = False,
    console: bool = False,
    flops_per_step: float | None = None,
    on_metrics: Callable[[int, dict[str, Any]], None] | None = None,
    exporter: Exporter | None = None,
) -> FitResult:
    """Trains until step `cfg.train.steps`, resuming the run in `run_dir` if one exists.

    A run that is interrupted and resumed gives bit-identical results to an uninterrupted one. On
    the first SIGINT or SIGTERM after the first step, the current step finishes, a checkpoint is
    saved, and `fit` returns. An earlier signal, when there is nothing to save, and a second one
    have their usual effect.

    Args:
        run_dir: directory of checkpoints, config.json, run.json, metrics.jsonl and loss.png.
        data: training batches instead of those of `cfg.data`: a `grain.MapDataset` whose element
            `step` is the `Batch` of that step, or an iterable of `Batch` from step 0 on. All
            processes get the whole batch. `cfg.data` describes the validation data.
        tx: any optax transformation instead of the optimizer of `cfg.train`. It has its own
            learning rate, and a resumed run needs the same `tx` again.
        loss_fn: (params, batch, dropout key or None) -> (the sum to differentiate, the sums of
            `CrossEntropy`), instead of the language model loss. Validation data are still evaluated
            by that one, and a resumed run needs the same `loss_fn` again.
        evaluators: called during training, beside the evaluation of validation data.
        writers: receive every record in the first process, beside those of `train.writers`. One
            that fails is closed, and the run continues without it.
        fresh: discard an existing run in `run_dir`.
        console: show progress on standard output.
        flops_per_step: of the model, forward and backward; adds the FLOP rate to the records.
        on_metrics: called with each record after it is written, in every process; an error in it
            ends the run.
        exporter: for `train.export_every`: writes parameters to a new folder.

    Raises:
        ConfigError: the config is invalid, `run_dir` belongs to another config, or another process
            trains in it; nothing on disk has changed.
        CheckpointError: the checkpoint cannot be read; nothing on disk has changed.
        DivergedError: `max_consecutive_skips` consecutive updates were skipped.
        OSError: the disk is full or failed; the last complete checkpoint is intact.
    """
    clock, is_first = Clock(), jax.process_index() == 0
    run_dir = rundir.expand(run_dir)
    rundir.check_folder(run_dir)
    setup.check_outputs(cfg, writers, exporter)
    with lock.hold(run_dir):
        rundir.check_fresh(run_dir) if fresh else rundir.check(run_dir, cfg)
        devices = make_devices(cfg.mesh)
        check_divisibility(cfg, devices.rules, devices.mesh.shape)
        train, validation = setup.train_batches(cfg, data), setup.validation_sets(cfg)
        check_evaluators(evaluators, list(validation))
        program = TrainProgram(cfg, devices, tx, loss_fn)
        resumed = None if fresh else _resume(program, run_dir, train)
        state, progress = resumed or (_start(program), Progress())
        train = train.skip(progress.skips)
        run_id = rundir.tracker_id(run_dir, fresh=fresh)
        facts = setup.facts_of_run(cfg, state, train, validation) | {"tracker_id": run_id}
        # Everything above may raise; from here on the disk changes.
        setup.prepare_directory(
            cfg,
            run_dir,
            facts,
            [getattr(train, "examples", None), *validation.values()],
            step=progress.step,
            starts=resumed is None,
            fresh=fresh,
        )
        if console and is_first:
            setup.show_trained(facts)
        options: dict[str, Any] = dict(step=progress.step, run_id=run_id, console=console)
        opened = setup.open_writers(cfg, run_dir, writers, on_metrics, **options)
        outputs = setup.open_outputs(cfg, run_dir, opened, exporter)
        resume = functools.partial(_resume, program, run_dir, train)
        with process_log(run_dir), compiled_programs(), contextlib.closing(Stop()) as stop:
            log.info("starts at step %d of %d", progress.step, cfg.train.steps)
            with outputs, devices.active():
                evaluation = Evaluation(program, progress, validation, evaluators, stop)
                rates = Rates.on(devices, flops_per_step)
                loop = Loop(
                    program, state, progress, train, evaluation, outputs, stop, rates, clock, resume
                )
                loop.run()
            log.info("ends at step %d of %d", progress.step, cfg.train.steps)
            finished = progress.step == cfg.train.steps
            if is_first:
                _finish(cfg, run_dir, clock, finished=finished)
    return FitResult(
        state=loop.state, step=progress.step, finished=finished, evaluation=progress.evaluation
    )


def _finish(cfg: ExperimentConfig, run_dir: Path, clock: Clock, *, finished: bool) -> None:
    """Records the seconds of a run, and draws the loss of a finished one."""
    with extra(f"adding the seconds of the run to {rundir.RUN}"):
        rundir.add_facts(run_dir, {"seconds": clock.parts | {"total": clock.total()}})
    if finished:
        with extra(f"the picture {rundir.CURVE}"):
            records = rundir.read_metrics(run_dir / rundir.METRICS)
            plots.loss_curve(records, run_dir / rundir.CURVE, cfg.name)


def _start(program: TrainProgram) -> TrainState:
    """The state of a new run."""
    if program.cfg.init_from is None:
        return program.init()
    return program.init_from(initial.load_params(program))


def _resume(
    program: TrainProgram, run_dir: Path, train: TrainBatches
) -> tuple[TrainState, Progress] | None:
    """The newest state of the run, sharded over its devices, and its progress; None if unsaved."""
    if checkpoint.has_params_only(run_dir):
        _, params = checkpoint.restore_params(run_dir, shardings=program.devices.shardings)
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
