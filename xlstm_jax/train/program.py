"""The compiled training program: the one that a run executes, `plan` compiles and benchmarks time.

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

_number = itertools.count()


class TrainProgram:
    """The step of a run with its metric totals, on real devices or an ahead-of-time target's.

    `tx` may be any optax transformation; None is the one of `cfg.train`.
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
        state = jax.eval_shape(self._first_state)
        totals = jax.eval_shape(metrics.empty)
        ids = jax.ShapeDtypeStruct((cfg.data.batch_size, cfg.data.seq_len), jnp.int32)
        weights = jax.ShapeDtypeStruct(ids.shape, jnp.float32)
        index = jax.ShapeDtypeStruct(ids.shape[:1], jax.dtypes.canonicalize_dtype(np.int64))
        batch = Batch(ids, ids, ids, weights, index)
        # Of `step`: shapes and shardings.
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

        Call it within `devices.active()`. A second trace is an error: it would be a silent delay.
        """
        train_step = make_train_step(self.model, self.tx, self.cfg.train)

        def step(state: TrainState, totals: metrics.Totals, batch: Batch):
            with use_rules(self.devices.rules):
                state, now = train_step(state, batch)
            return state, metrics.add(totals, now)

        # By its name chex tells it from other programs of this process.
        step.__name__ = f"train_step_{next(_number)}"
        once = chex.assert_max_traces(step, n=1)
        once.__name__ = "train_step"
        state, totals, batch = jax.tree.map(lambda x: x.sharding, self.arguments)
        return jax.jit(
            once,
            in_shardings=(state, totals, batch),
            out_shardings=(state, totals),
            donate_argnums=(0, 1),
        )

    @functools.cached_property
    def held_out_sums(self) -> Callable[[PyTree, Batch], CrossEntropy]:
        """The jitted `(params, batch) -> sums` of the held-out loss."""
        resets = self.cfg.train.document_resets

        def sums(params: PyTree, batch: Batch) -> CrossEntropy:
            with use_rules(self.devices.rules):
                return losses.token_sums(self.model, params, batch, document_resets=resets)[0]

        return jax.jit(sums)

    def evaluate(
        self, params: PyTree, examples: Examples, should_stop: Callable[[], bool] = lambda: False
    ) -> dict[str, float] | None:
        """The metrics of held-out data, over all tokens of `eval_batches`; None if told to stop.

        These are windows spread evenly over the split, the same ones each time; see
        `data.eval_batches`.
        """
        total = losses.HeldOut()
        for batch in loader.eval_batches(examples, self.cfg.data, self.cfg.train.eval_batches):
            if should_stop():
                return None
            sums = self.held_out_sums(params, self.devices.batch(batch))
            total = total.plus(sums, batch, examples)
        measured = {
            "valid_loss": total.nats_per_token,
            "valid_accuracy": total.num_correct / total.num_tokens,
            "valid_tokens": total.num_tokens,
        }
        bits = total.bits_per_byte
        return measured if bits is None else measured | {"valid_bits_per_byte": bits}

    def _first_state(self, devices: Devices | None = None) -> TrainState:
        key, tokens = jax.random.key(self.cfg.train.seed), jnp.zeros((1, 1), jnp.int32)
        return init_state(self.model, self.tx, key, tokens, devices=devices)

    def init(self) -> TrainState:
        """The state before the first step, each leaf created on its devices."""
        return self._first_state(self.devices)

    def init_from(self, params: PyTree) -> TrainState:
        """The state before the first step of given parameters."""
        shardings = jax.tree.map(lambda x: x.sharding, self.arguments[0])
        make = jax.jit(lambda params: first_state(params, self.tx), out_shardings=shardings)
        return make(params)

    def compile(self) -> jax.stages.Compiled:
        """`step` compiled from shapes alone; computes nothing."""
        with self.devices.active():
            return self.step.lower(*self.arguments).compile()
