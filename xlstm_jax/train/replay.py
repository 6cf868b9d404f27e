"""Recomputes a skipped step from RUN/diverged.json."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import jax

from xlstm_jax.config import ConfigError, load_config
from xlstm_jax.data import loader
from xlstm_jax.data.batch import Batch, differences_of_data
from xlstm_jax.data.stream import Stream
from xlstm_jax.errors import quote_path
from xlstm_jax.program_cache import compiled_programs
from xlstm_jax.sharding.axes import path_name
from xlstm_jax.sharding.devices import make_devices
from xlstm_jax.sharding.rules import use_rules
from xlstm_jax.train import checkpoint, dump, metrics
from xlstm_jax.train.carry import state_before
from xlstm_jax.train.config import ExperimentConfig, check_divisibility, check_vocabulary
from xlstm_jax.train.dump import Dump
from xlstm_jax.train.optimizer import norm
from xlstm_jax.train.program import TrainProgram
from xlstm_jax.train.state import TrainState
from xlstm_jax.train.step import dropout_key, loss_of_trained, sum_gradients
from xlstm_jax.train.trainable import partition


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replay:
    """The recomputed numbers of a skipped step, beside those of the run."""

    dump: Dump
    from_step: int  # of the state that was restored, or of the start of the run
    loss: float
    grad_norm: float
    reproduced: bool  # whether the step was skipped again, with equal loss and gradient norm
    gradient_norms: dict[str, float]  # of every parameter, by path

    @property
    def non_finite(self) -> list[str]:
        """The parameters whose gradients are not finite."""
        return [name for name, value in self.gradient_norms.items() if not math.isfinite(value)]


def replay(path: Path) -> Replay:
    """Recomputes the step of a dump with the program of its run, from the state before it.

    After a divergence that state is part of the dump. Otherwise the run is repeated from its last
    checkpoint before the step, or from its start, with its data.

    Raises:
        ConfigError: a file of the dump is missing or damaged, `fit` had arguments that the config
            does not describe, or the data differ.
    """
    about = dump.read(path)
    folder = path.parent / dump.FOLDER
    if custom := [name for name in about.given if name != "data"]:
        raise ConfigError(
            f"{quote_path(path)} cannot be replayed, because fit was called with "
            f"{', '.join(custom)}=..., which no file describes; call make_train_step with them on "
            f"the state and the batch in {quote_path(folder)}."
        )
    cfg = load_config(folder, ExperimentConfig)
    devices = make_devices(cfg.mesh)
    check_divisibility(cfg, devices.rules, devices.mesh.shape)
    program = TrainProgram(cfg, devices)
    step = about.first_skipped_step
    with compiled_programs(), devices.active():
        state = _state(program, path, about)
        from_step = int(state.step)
        state = _repeat(program, state, about)
        batch = dump.read_batch(folder / dump.BATCH, cfg, step) or _stream(cfg, about).batch(step)
        on_devices = devices.batch(batch, cfg.batch_sizes.at(step))
        # Before the step, which donates the state.
        loss, norms = jax.device_get(_gradients(program)(state, on_devices))
        totals = devices.replicate(metrics.empty())
        # The program of the run, for equal bits; `_gradients` may round differently.
        first = jax.device_get(program.step(state, totals, on_devices)[0].guard.first)
    skipped = int(first.step) == step
    exact = (float(first.loss), float(first.grad_norm))
    recorded = (float(about.loss), float(about.grad_norm))
    return Replay(
        dump=about,
        from_step=from_step,
        loss=exact[0] if skipped else float(loss),
        grad_norm=exact[1] if skipped else math.hypot(*map(float, norms.values())),
        reproduced=skipped and [*map(repr, exact)] == [*map(repr, recorded)],  # nan equals nan
        gradient_norms={name: float(value) for name, value in norms.items()},
    )


def _state(program: TrainProgram, path: Path, about: Dump) -> TrainState:
    """The newest saved state up to the skipped step; else the initial state."""
    step, like = about.first_skipped_step, program.arguments[0]
    folder = path.parent / dump.FOLDER if about.diverged else path.parent
    if checkpoint.latest_step(folder, step) == 0 and checkpoint.has_params_only(folder, step):
        _, params = checkpoint.restore_params(folder, 0, program.devices.shardings)
        return program.init_from(params)
    restored = checkpoint.restore_latest(folder, like, step)
    if restored is not None:
        return restored[0]
    if about.diverged or program.cfg.init_from is not None:
        raise ConfigError(
            f"{quote_path(folder / checkpoint.FOLDER)} must have a checkpoint up to step {step}, "
            "but it has none; restore it."
        )
    return program.init()


def _repeat(program: TrainProgram, state: TrainState, about: Dump) -> TrainState:
    """Runs the steps from that of the state to the skipped one."""
    steps = range(int(state.step), about.first_skipped_step)
    if not steps:
        return state
    stream, sizes = _stream(program.cfg, about), program.cfg.batch_sizes
    totals = program.devices.replicate(metrics.empty())
    with stream.batches(steps.start, len(steps)) as batches:
        for step in steps:
            batch = program.devices.batch(next(batches), sizes.at(step))
            state, totals = program.step(state, totals, batch)
    return state


def _stream(cfg: ExperimentConfig, about: Dump) -> Stream:
    """The training data of the run; raises ConfigError if they differ."""
    if "data" in about.given:
        raise ConfigError(
            f"step {about.first_skipped_step} cannot be replayed, because it needs batches that "
            "the caller of fit passed as data=..., which no file describes; pass data.source."
        )
    examples = loader.load(cfg.data, "train")
    check_vocabulary(cfg, examples)
    stream = Stream(examples, cfg.data, cfg.batch_sizes).skip(about.skips)
    if lines := differences_of_data(stream.description, about.data):
        raise ConfigError(
            f"data.source must be the data of the run, but they differ ({'; '.join(lines)}); "
            "restore them."
        )
    return stream


def _gradients(program: TrainProgram) -> Any:
    """The jitted `(state, batch) -> (loss, gradient norm of every trained parameter by path)`."""
    model, cfg = program.model, program.cfg.train

    def gradients(state: TrainState, batch: Batch):
        trained, frozen = partition(state.params, cfg.freeze)
        loss_of = loss_of_trained(model, cfg, frozen, lora_cfg=program.cfg.lora)
        recurrent = None
        if cfg.carry_state:
            recurrent = state_before(state.carry, batch, document_resets=cfg.document_resets)
        with use_rules(program.devices.rules):
            key = dropout_key(model, cfg, state.step)
            args = trained, batch, key, cfg.accumulation, recurrent
            grads, sums, _ = sum_gradients(loss_of, *args)
        norms = {
            path_name(path): norm(grad) / sums.weight_sum
            for path, grad in jax.tree.leaves_with_path(grads)
        }
        return sums.ce_sum / sums.weight_sum, norms

    return jax.jit(gradients)
