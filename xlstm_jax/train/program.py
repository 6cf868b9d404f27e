"""The jitted training program, which runs execute, `plan` compiles and benchmarks time.

program = TrainProgram(cfg, make_devices(cfg.mesh))
state, totals = program.init(), program.devices.replicate(metrics.empty())
with program.devices.active():
    state, totals = program.step(state, totals, program.devices.batch(batch))
"""

import functools
import itertools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from xlstm_jax.data import loader
from xlstm_jax.data.batch import Batch, Examples
from xlstm_jax.modules.initializers import random_key
from xlstm_jax.modules.lm import LM
from xlstm_jax.ops.cross_entropy import CrossEntropy
from xlstm_jax.sharding.devices import Devices
from xlstm_jax.sharding.rules import use_rules
from xlstm_jax.train import losses, metrics
from xlstm_jax.train.config import ExperimentConfig
from xlstm_jax.train.optimizer import make_optimizer
from xlstm_jax.train.state import TrainState, first_state, init_state
from xlstm_jax.train.step import make_train_step
from xlstm_jax.typing import PyTree

_number = itertools.count()  # makes the names of the steps of a process unique


class TrainProgram:
    """The train step of a run with its metric totals, for attached devices or an AOT target.

    `tx` may be any optax transformation; None makes the optimizer of `cfg.train`.
    """

    def __init__(
        self,
        cfg: ExperimentConfig,
        devices: Devices,
        tx: optax.GradientTransformation | None = None,
    ):
        self.cfg, self.devices = cfg, devices
        self.model = LM(cfg.model)
        self.tx = make_optimizer(cfg.train) if tx is None else tx
        self.given = () if tx is None else ("tx",)  # what the config does not describe
        state = jax.eval_shape(self._first_state)
        totals = jax.eval_shape(metrics.empty)
        ids = jax.ShapeDtypeStruct((cfg.data.batch_size, cfg.data.seq_len), jnp.int32)
        weights = jax.ShapeDtypeStruct(ids.shape, jnp.float32)
        # As `Devices.batch` makes it: int32 unless 64-bit types are enabled.
        index = jax.ShapeDtypeStruct(ids.shape[:1], jax.dtypes.canonicalize_dtype(np.int64))
        batch = Batch(ids, ids, ids, weights, index)
        # Shapes and shardings of the arguments of `step`.
        self.arguments: tuple[TrainState, metrics.Totals, Batch] = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            (state, totals, batch),
            (
                devices.shardings(state),
                jax.tree.map(lambda _: devices.replicated, totals),
                jax.tree.map(lambda x: devices.batch_sharding(x.ndim), batch),
            ),
        )

    @functools.cached_property
    def step(self) -> jax.stages.Wrapped:
        """The jitted `(state, totals, batch) -> (state, totals)`, with state and totals donated.

        Call it within `devices.active()`. It is traced once for every batch size of the run; one
        more trace raises, because it would silently compile the step again.
        """
        train_step = make_train_step(self.model, self.tx, self.cfg.train)

        def step(state: TrainState, totals: metrics.Totals, batch: Batch):
            # Inside the jitted function: the rules are read while it is traced.
            with use_rules(self.devices.rules):
                state, step_metrics = train_step(state, batch)
            return state, metrics.add(totals, step_metrics)

        # chex counts traces by name, so every program of this process needs its own.
        step.__name__ = f"train_step_{next(_number)}"
        once = chex.assert_max_traces(step, n=len(self.cfg.batch_sizes.distinct))
        once.__name__ = "train_step"  # the name in profiles and HLO
        state, totals, batch = jax.tree.map(lambda x: x.sharding, self.arguments)
        return jax.jit(
            once,
            in_shardings=(state, totals, batch),
            out_shardings=(state, totals),
            donate_argnums=(0, 1),
        )

    @functools.cached_property
    def eval_sums(self) -> Callable[[PyTree, Batch], CrossEntropy]:
        """The jitted `(params, batch) -> sums` of the held-out loss."""
        resets = self.cfg.train.document_resets

        def sums(params: PyTree, batch: Batch) -> CrossEntropy:
            with use_rules(self.devices.rules):
                return losses.token_sums(self.model, params, batch, document_resets=resets)[0]

        return jax.jit(sums)

    def evaluate(
        self,
        params: PyTree,
        examples: Examples,
        should_stop: Callable[[], bool] = lambda: False,
        name: str = "valid",
    ) -> dict[str, float] | None:
        """The metrics of held-out data, which `name` prefixes; None if `should_stop` returned True.

        The windows are those of `data.eval_batches`, the same for every evaluation.
        """
        total = losses.EvalSums()
        for batch in loader.eval_batches(examples, self.cfg.data, self.cfg.train.eval_batches):
            if should_stop():
                return None
            # Every process loads the global batch: evaluation needs its weights on the host.
            sums = self.eval_sums(params, self.devices.batch(batch))
            total = total.plus(sums, batch, examples)
        evaluation = {
            f"{name}_loss": total.nats_per_token,
            f"{name}_accuracy": total.num_correct / total.num_tokens,
            f"{name}_tokens": total.num_tokens,
        }
        bits = total.bits_per_byte
        return evaluation if bits is None else evaluation | {f"{name}_bits_per_byte": bits}

    def _first_state(self, devices: Devices | None = None) -> TrainState:
        # Parameters do not depend on the tokens, so the smallest batch initializes them.
        key, tokens = random_key(self.cfg.train.seed), jnp.zeros((1, 1), jnp.int32)
        return init_state(self.model, self.tx, key, tokens, devices=devices)

    def init(self) -> TrainState:
        """The initial state, each leaf created sharded on its devices."""
        return self._first_state(self.devices)

    def init_from(self, params: PyTree) -> TrainState:
        """The initial state for these parameters."""
        shardings = jax.tree.map(lambda x: x.sharding, self.arguments[0])
        make = jax.jit(lambda params: first_state(params, self.tx), out_shardings=shardings)
        return make(params)

    def compile(self) -> jax.stages.Compiled:
        """Compiles `step` from shapes alone, without computing anything."""
        with self.devices.active():
            return self.step.lower(*self.arguments).compile()
