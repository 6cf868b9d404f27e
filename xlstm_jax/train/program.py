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
from xlstm_jax.modules.initializers import jit_once, random_key
from xlstm_jax.modules.lm import LM
from xlstm_jax.ops.cross_entropy import CrossEntropy
from xlstm_jax.sharding.devices import Devices
from xlstm_jax.sharding.rules import use_rules
from xlstm_jax.train import losses, metrics
from xlstm_jax.train.carry import Carry
from xlstm_jax.train.config import ExperimentConfig
from xlstm_jax.train.lora import adapters
from xlstm_jax.train.optimizer import make_optimizer
from xlstm_jax.train.state import TrainState, first_state
from xlstm_jax.train.step import LossFn, make_train_step
from xlstm_jax.typing import PRNGKeyArray, PyTree

_LORA = 2  # folded into the key of the seed, which itself initializes the parameters; 1: dropout

_number = itertools.count()  # makes the names of the steps of a process unique


class TrainProgram:
    """The train step of a run with its metric totals, for attached devices or an AOT target.

    `tx` may be any optax transformation; None makes the optimizer of `cfg.train`. `loss_fn` is the
    one of `make_train_step`; validation data are evaluated by the language model loss.
    """

    def __init__(
        self,
        cfg: ExperimentConfig,
        devices: Devices,
        tx: optax.GradientTransformation | None = None,
        loss_fn: LossFn | None = None,
    ):
        self.cfg, self.devices, self.loss_fn = cfg, devices, loss_fn
        self.model = LM(cfg.model)
        self.tx = make_optimizer(cfg.train) if tx is None else tx
        self._train_step = make_train_step(
            self.model, self.tx, cfg.train, loss_fn, lora_cfg=cfg.lora
        )
        # What the config does not describe.
        self.given = tuple(
            name for name, value in (("tx", tx), ("loss_fn", loss_fn)) if value is not None
        )
        state = jax.eval_shape(self._first_state, random_key(0))
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
                self._shardings(state),
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

        def step(state: TrainState, totals: metrics.Totals, batch: Batch):
            # Inside the jitted function: the rules are read while it is traced.
            with use_rules(self.devices.rules):
                state, step_metrics = self._train_step(state, batch)
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
        """The jitted `(params, batch) -> sums` of the validation loss."""
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
        """Validation metrics, with the prefix `name`; None if `should_stop` returned True.

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

    def _first_state(self, key: PRNGKeyArray, params: PyTree = None) -> TrainState:
        """The initial state, for given parameters of the model or for random ones."""
        cfg = self.cfg
        if params is None:
            # Parameters do not depend on the tokens, so the smallest batch initializes them.
            params = self.model.init(key, jnp.zeros((1, 1), jnp.int32))["params"]
        params = adapters.attach(params, cfg.lora, jax.random.fold_in(key, _LORA))
        ema = cfg.train.ema_decay > 0
        state = first_state(params, self.tx, freeze=cfg.train.freeze, ema=ema)
        if cfg.train.carry_state:
            state = state.replace(carry=Carry.start(self.model, cfg.data.batch_size))
        return state

    def _shardings(self, state: TrainState) -> TrainState:
        """The sharding of every leaf of a state; sequences of its carry are as those of a batch."""
        carry, batch = state.carry, self.devices.batch_sharding(1)
        if carry is not None:
            recurrent = jax.tree.map(lambda _: self.devices.sharding(None, "batch"), carry.state)
            carry = Carry(recurrent, batch)
        return self.devices.shardings(state.replace(carry=None)).replace(carry=carry)

    @property
    def shardings(self) -> TrainState:
        """The sharding of every leaf of the state."""
        return jax.tree.map(lambda x: x.sharding, self.arguments[0])

    def init(self) -> TrainState:
        """The initial state, each leaf created sharded on its devices."""
        with self.devices.active():
            make = jit_once(self._first_state, out_shardings=self.shardings)
            return make(random_key(self.cfg.train.seed))

    def init_from(self, params: PyTree) -> TrainState:
        """The initial state for parameters of the model, which are donated: they are not copied."""
        shardings = self.shardings
        param_shardings = {name: shardings.params[name] for name in params}
        params = jax.device_put(params, param_shardings, donate=True)
        make = jax.jit(self._first_state, out_shardings=shardings, donate_argnums=1)
        with self.devices.active():
            return make(random_key(self.cfg.train.seed), params)

    def compile(self) -> jax.stages.Compiled:
        """Compiles `step` from shapes alone, without computing anything."""
        with self.devices.active():
            return self.step.lower(*self.arguments).compile()
