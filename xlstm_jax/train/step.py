"""The train step: a pure function of a state and a batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from xlstm_jax.cells.logspace import common_dtype
from xlstm_jax.config import ConfigError
from xlstm_jax.data.batch import Batch
from xlstm_jax.errors import ArgumentError
from xlstm_jax.modules.initializers import random_key
from xlstm_jax.ops.cross_entropy import CrossEntropy
from xlstm_jax.train import guard, losses
from xlstm_jax.train.averages import update_ema
from xlstm_jax.train.carry import Carry, state_before
from xlstm_jax.train.config import LoraConfig, TrainConfig
from xlstm_jax.train.lora import adapters
from xlstm_jax.train.metrics import Metrics
from xlstm_jax.train.optimizer import ScheduledOptimizer, norm
from xlstm_jax.train.state import TrainState
from xlstm_jax.train.trainable import combine, partition
from xlstm_jax.typing import Array, ArrayLike, Float, Int, PRNGKeyArray, PyTree

LossFn = Callable[[PyTree, Batch, PRNGKeyArray | None], tuple[Float[Array, ""], CrossEntropy]]
# As `LossFn`, with the recurrent state before the batch as a further argument and after it as a
# further result: (params, batch, key, state) -> (sum, (CrossEntropy, state)).
StatefulLossFn = Callable[..., tuple[Float[Array, ""], tuple[CrossEntropy, PyTree]]]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]

NO_ADAPTERS = LoraConfig()
_DROPOUT = 1  # folded into the key of the seed, which itself initializes the parameters


def make_train_step(
    model: Any,
    tx: optax.GradientTransformation,
    cfg: TrainConfig,
    loss_fn: LossFn | None = None,
    *,
    lora_cfg: LoraConfig = NO_ADAPTERS,
) -> TrainStep:
    """Makes the train step `(state, batch) -> (state, metrics)`.

    The step is pure and not jitted: `jax.jit` it with the state donated, `jax.vmap` it over states
    with `in_axes=(0, None)` to train many seeds on the same batches, or `jax.lax.scan` it over
    batches.

    The metrics are scalars. `loss` is the mean cross entropy over all tokens, without the z-loss;
    `grad_norm` is measured before clipping; `skipped` is 1 if the guard skipped the update;
    `skipped_in_a_row` counts consecutive skipped updates; `lr` is absent unless `tx` is a result of
    `make_optimizer`.

    Gradients are computed for the trained parameters only: those that `cfg.freeze` does not match,
    or the adapters under the key "lora" of the parameters. All norms, weight decay and the guard
    concern these parameters.

    Args:
        model: an `LM`, or a module with the same call signature.
        tx: the result of `make_optimizer`, or any other optax transformation.
        cfg: gradient accumulation, guard, z-loss, frozen parameters, carried state, moving average.
        loss_fn: the sums of a batch; None uses `losses.language_model_loss`.
        lora_cfg: scale of the adapters, which are merged before the loss is computed.

    Raises:
        ConfigError: `loss_fn` cannot carry the recurrent state that `cfg.carry_state` asks for.
    """
    if cfg.carry_state and loss_fn is not None:
        raise ConfigError(
            "train.carry_state must be False with a loss_fn of your own, which takes no recurrent "
            "state; leave one of them out."
        )

    tx = optax.with_extra_args_support(tx)  # ignores step and lr_scale unless tx takes them

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = dropout_key(model, cfg, state.step)
        trained, frozen = partition(state.params, cfg.freeze)
        recurrent = None
        if cfg.carry_state:
            recurrent = state_before(state.carry, batch, document_resets=cfg.document_resets)
        loss_of = loss_of_trained(model, cfg, frozen, loss_fn, lora_cfg)
        grads, sums, recurrent = sum_gradients(
            loss_of, trained, batch, key, cfg.accumulation, recurrent
        )
        # A batch without targets gives 0/0, which the guard skips.
        grads = jax.tree.map(lambda g: g / sums.weight_sum.astype(g.dtype), grads)
        loss = sums.ce_sum / sums.weight_sum
        grad_norm = norm(grads)
        ok, new_guard = guard.check_update(state.guard, state.step, loss, grad_norm, cfg)
        updates, opt_state = tx.update(
            grads, state.opt_state, trained, step=state.step, lr_scale=state.lr_scale
        )
        trained = guard.select(ok, optax.apply_updates(trained, updates), trained)
        carry = state.carry
        if cfg.carry_state:
            # A skipped step may have computed NaN. Its sequences then start anew, because the
            # next windows do not follow those of the old carry.
            carry = guard.select(ok, Carry(recurrent, batch.index), carry)
        new = state.replace(
            step=state.step + 1,  # also if skipped, so that the next batch is another one
            params=combine(trained, frozen),
            opt_state=guard.select(ok, opt_state, state.opt_state),
            guard=new_guard,
            carry=carry,
        )
        if cfg.ema_decay:
            new = new.replace(ema=guard.select(ok, _ema(state.ema, trained, cfg), state.ema))
        metrics = _of_batch(sums, batch) | {
            "grad_norm": grad_norm,
            "update_norm": jnp.where(ok, norm(updates), 0.0),
            "param_norm": norm(trained),
            "skipped": 1 - ok.astype(jnp.int32),
            "skipped_in_a_row": new_guard.skipped,
        }
        if isinstance(tx, ScheduledOptimizer):
            metrics["lr"] = jnp.asarray(tx.schedule(state.step) * state.lr_scale)
        return new, metrics

    return train_step


def loss_of_trained(
    model: Any,
    cfg: TrainConfig,
    frozen: PyTree,
    loss_fn: LossFn | None = None,
    lora_cfg: LoraConfig = NO_ADAPTERS,
) -> StatefulLossFn:
    """The loss of a train step as a function of the trained parameters."""

    def loss_of(trained, batch, key, state):
        params = adapters.merged(combine(trained, frozen), lora_cfg)
        if loss_fn is None:
            return losses.stateful_loss(model, params, batch, cfg, key, state)
        loss, sums = loss_fn(params, batch, key)
        return loss, (sums, None)

    return loss_of


def _of_batch(sums: CrossEntropy, batch: Batch) -> Metrics:
    """The metrics of a batch that depend on its tokens only."""
    loss = sums.ce_sum / sums.weight_sum
    return {
        "loss": loss,
        "z_loss": sums.z_sum / sums.weight_sum,
        "perplexity": jnp.exp(loss),
        "accuracy": sums.correct_sum / sums.weight_sum,
        "tokens": sums.weight_sum,
        "documents": _count_documents(batch.segment_ids),
        "padding_fraction": jnp.mean(batch.segment_ids == 0),
    }


def _count_documents(segment_ids: Int[Array, "B T"]) -> Int[Array, ""]:
    # Ids are consecutive in each sequence. The first is 1, or 2 in a stream, or 0 in padding.
    first = jnp.maximum(segment_ids[:, 0], 1)
    return jnp.sum(jnp.maximum(jnp.max(segment_ids, axis=-1) - first + 1, 0))


def _ema(ema: PyTree, params: PyTree, cfg: TrainConfig) -> PyTree:
    if ema is None:
        raise ArgumentError(
            f"state.ema must be a tree with train.ema_decay={cfg.ema_decay}, got None; create the "
            "state with ema=True."
        )
    return update_ema(ema, params, cfg.ema_decay)


def dropout_key(model: Any, cfg: TrainConfig, step: Int[ArrayLike, ""]) -> PRNGKeyArray | None:
    """The key of a step, a function of the seed and the step; None without dropout."""
    if not model.cfg.has_dropout:
        return None
    return jax.random.fold_in(jax.random.fold_in(random_key(cfg.seed), _DROPOUT), step)


def sum_gradients(
    loss_fn: StatefulLossFn,
    params: PyTree,
    batch: Batch,
    key: PRNGKeyArray | None,
    num_parts: int = 1,
    state: PyTree = None,
) -> tuple[PyTree, CrossEntropy, PyTree]:
    """Gradients of the summed loss, and the sums, accumulated over `num_parts` micro-batches.

    Sums of micro-batches with different numbers of tokens add up to the sum of the batch; means do
    not. The last result is the recurrent state after the batch, from `state` before it.
    """

    def grad_fn(*args):
        grads, (sums, after) = jax.grad(loss_fn, has_aux=True)(*args)
        return (grads, sums), after

    if num_parts == 1:
        (grads, sums), state = grad_fn(params, batch, key, state)
        return grads, sums, state
    num_sequences = len(batch.inputs)
    if num_sequences % num_parts:
        raise ArgumentError(
            f"a batch must have a multiple of {num_parts} sequences, got {num_sequences}; "
            f"change data.batch_size or train.accumulation={num_parts}."
        )
    # Strided, so that every micro-batch has sequences on every device.
    parts = jax.tree.map(lambda x: _divide(x, num_parts, axis=0), batch)
    states = jax.tree.map(lambda x: _divide(x, num_parts, axis=1), state)
    first = jax.tree.map(lambda x: x[0], (parts, states))
    shapes, _ = jax.eval_shape(grad_fn, params, first[0], key, first[1])
    # Accumulated in float32 or wider, whatever the dtype of the parameters.
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, common_dtype(jnp.float32, s.dtype)), shapes)

    def body(total, inputs):
        index, part, before = inputs
        part_key = None if key is None else jax.random.fold_in(key, index)
        grads_and_sums, after = grad_fn(params, part, part_key, before)
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, grads_and_sums), after

    inputs = (jnp.arange(num_parts), parts, states)
    (grads, sums), states = jax.lax.scan(body, zeros, inputs)
    return grads, sums, jax.tree.map(lambda x: _rejoin(x, axis=1), states)


def _divide(x: Array, num_parts: int, axis: int) -> Array:
    """Every `num_parts`-th index along an axis; the parts are a new leading axis."""
    shape = (*x.shape[:axis], -1, num_parts, *x.shape[axis + 1 :])
    return jnp.moveaxis(x.reshape(shape), axis + 1, 0)


def _rejoin(x: Array, axis: int) -> Array:
    """The inverse of `_divide`."""
    x = jnp.moveaxis(x, 0, axis + 1)
    return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
