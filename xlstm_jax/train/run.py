"""`fit`: starts or resumes a run and trains it to its last step."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import optax

from xlstm_jax.config import ConfigError, to_dict
from xlstm_jax.data import loader
from xlstm_jax.data.batch import Examples, differences_of_data
from xlstm_jax.data.mixture import check_tokenizers
from xlstm_jax.data.stream import Stream
from xlstm_jax.data.windows import Windows
from xlstm_jax.errors import quote
from xlstm_jax.program_cache import compiled_programs
from xlstm_jax.sharding.devices import make_devices
from xlstm_jax.train import checkpoint, initial, lock, lora, plots, rundir
from xlstm_jax.train.batches import GivenBatches, TrainBatches
from xlstm_jax.train.clock import Clock
from xlstm_jax.train.config import ExperimentConfig, check_divisibility, check_vocabulary
from xlstm_jax.train.evaluation import Evaluation
from xlstm_jax.train.evaluators import Evaluator, check_evaluators
from xlstm_jax.train.loop import Loop
from xlstm_jax.train.outputs import Exporter, Outputs
from xlstm_jax.train.processes import Stop, extra, log, process_log, sync_processes
from xlstm_jax.train.profiler import Profiler
from xlstm_jax.train.program import TrainProgram
from xlstm_jax.train.progress import Progress
from xlstm_jax.train.rates import Rates
from xlstm_jax.train.state import TrainState
from xlstm_jax.train.step import LossFn
from xlstm_jax.train.trainable import ADAPTERS, num_bytes, partition
from xlstm_jax.train.writers import (
    CallbackWriter,
    ConsoleWriter,
    JsonlWriter,
    OptionalWriter,
    Writer,
    check_services,
    open_service,
)


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
        data: training batches in place of those of `cfg.data`: a `grain.MapDataset` whose element
            `step` is the `Batch` of that step, or an iterable of `Batch` from step 0 on. All
            processes get the whole batch. `cfg.data` describes the held-out data.
        tx: any optax transformation in place of the optimizer of `cfg.train`. It has its own
            learning rate, and a resumed run needs the same `tx` again.
        loss_fn: (params, batch, dropout key or None) -> (the sum to differentiate, the sums of
            `CrossEntropy`), in place of the language model loss. Held-out data are still evaluated
            by that one, and a resumed run needs the same `loss_fn` again.
        evaluators: called during training, beside the evaluation of held-out data.
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
    clock = Clock()
    run_dir = rundir.expand(run_dir)
    rundir.check_folder(run_dir)
    _check_outputs(cfg, writers, exporter)
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
            loss_fn=loss_fn,
            evaluators=evaluators,
            writers=writers,
            fresh=fresh,
            console=console,
            flops_per_step=flops_per_step,
            on_metrics=on_metrics,
            exporter=exporter,
            clock=clock,
        )


def _fit(
    cfg: ExperimentConfig,
    run_dir: Path,
    *,
    data: Any,
    tx: optax.GradientTransformation | None,
    loss_fn: LossFn | None,
    evaluators: Sequence[Evaluator],
    writers: Sequence[Writer],
    fresh: bool,
    console: bool,
    flops_per_step: float | None,
    on_metrics: Callable[[int, dict[str, Any]], None] | None,
    exporter: Exporter | None,
    clock: Clock,
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
    check_evaluators(evaluators, list(held_out))
    program = TrainProgram(cfg, devices, tx, loss_fn)
    resumed = None if fresh else _resume(program, run_dir, train)
    state, progress = resumed or (_start(program), Progress())
    facts = {
        **_sizes(state, cfg),
        "tracker_id": rundir.tracker_id(run_dir, fresh=fresh),
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
        if resumed is None and cfg.init_from is not None:
            initial.copy_notes(cfg, run_dir)
        for examples in (getattr(train, "examples", None), *held_out.values()):
            if (tokenizer := getattr(examples, "tokenizer", None)) is not None:
                tokenizer.save(run_dir / rundir.TOKENIZER)
                break
    sync_processes("the run directory is prepared")
    all_writers: list[Writer] = []
    if is_first:
        all_writers.append(JsonlWriter(run_dir / rundir.METRICS))
        all_writers += [ConsoleWriter(cfg.train.steps, progress.step)] if console else []
        services = _services(cfg, run_dir, progress.step, facts["tracker_id"])
        all_writers += map(OptionalWriter, [*services, *writers])
    if on_metrics is not None:
        all_writers.append(CallbackWriter(on_metrics))
    outputs = Outputs(
        run_dir=run_dir,
        writers=all_writers,
        checkpoints=checkpoint.Checkpointer(run_dir, cfg.train.keep),
        profiler=Profiler(cfg.train.profile_steps if is_first else None, run_dir / rundir.PROFILE),
        exporter=exporter if cfg.train.export_every else None,
    )
    with (
        process_log(run_dir),
        compiled_programs(),
        contextlib.closing(Stop()) as stop,
    ):
        log.info("starts at step %d of %d", progress.step, cfg.train.steps)
        with outputs, devices.active():
            evaluation = Evaluation(program, progress, held_out, evaluators, stop)
            rates = Rates.on(devices, flops_per_step)
            loop = Loop(program, state, progress, train, evaluation, outputs, stop, rates, clock)
            loop.run()
        log.info("ends at step %d of %d", progress.step, cfg.train.steps)
        finished = progress.step == cfg.train.steps
        if is_first:
            with extra(f"adding the seconds of the run to {rundir.RUN}"):
                rundir.add_facts(run_dir, {"seconds": clock.parts | {"total": clock.total()}})
        if finished and is_first:
            with extra(f"the picture {rundir.CURVE}"):
                records = rundir.read_metrics(run_dir / rundir.METRICS)
                plots.loss_curve(records, run_dir / rundir.CURVE, cfg.name)
    return FitResult(
        state=loop.state, step=progress.step, finished=finished, evaluation=progress.evaluation
    )


def _check_outputs(
    cfg: ExperimentConfig, writers: Sequence[Writer], exporter: Exporter | None
) -> None:
    """Raises ConfigError if a writer or an export cannot work."""
    check_services(cfg.train.writers)
    for writer in writers:
        if not isinstance(writer, Writer):
            raise ConfigError(
                "writers must have the methods write(step, metrics) and close(), got "
                f"{quote(writer)}; add them."
            )
    if cfg.train.export_every and exporter is None:
        raise ConfigError(
            f"train.export_every={cfg.train.export_every} needs the argument exporter of fit, got "
            "None; pass it, train with the command `xlstm-jax train`, or set it to 0."
        )


def _services(cfg: ExperimentConfig, run_dir: Path, step: int, run_id: str) -> Iterator[Writer]:
    """The writers of `train.writers`; one that cannot be opened is logged and left out."""
    for name in cfg.train.writers:
        with extra(f"opening the writer {name!r}"):
            yield open_service(
                name,
                run_dir,
                run_name=cfg.name,
                run_id=run_id,
                step=step,
                config=to_dict(cfg),
            )


def _stream(cfg: ExperimentConfig) -> Stream:
    """The training batches that a config describes."""
    examples = loader.load(cfg.data, "train")
    check_vocabulary(cfg, examples)
    if cfg.train.carry_state and not isinstance(examples, Windows):
        raise ConfigError(
            f"train.carry_state must be False with data.source={quote(cfg.data.source)}, whose "
            "samples are independent; use text."
        )
    return Stream(examples, cfg.data, cfg.batch_sizes)


def _start(program: TrainProgram) -> TrainState:
    """The state of a new run."""
    if program.cfg.init_from is None:
        return program.init()
    return program.init_from(initial.load_params(program))


def _sizes(state: TrainState, cfg: ExperimentConfig) -> dict[str, Any]:
    """The number of parameters, and bytes of the state over all devices."""
    trained, _ = partition(state.params, cfg.train.freeze)
    sizes = {
        "num_params": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "num_trained_params": sum(leaf.size for leaf in jax.tree.leaves(trained)),
        "params_bytes": num_bytes(state.params),
        "trained_params_bytes": num_bytes(trained),
        "optimizer_bytes": num_bytes(state.opt_state),
    }
    log.info("state: %s", ", ".join(f"{name} {size:,}" for name, size in sizes.items()))
    if not cfg.lora.rank:
        return sizes
    base = {name: tree for name, tree in state.params.items() if name != ADAPTERS}
    found = lora.targets(base, cfg.lora)
    log.info("adapters: %s; without: %s", ", ".join(found.matrices), ", ".join(found.skipped))
    return sizes | {"lora": found._asdict()}


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
