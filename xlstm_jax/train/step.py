"""The train step: a pure function of a state and a batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from xlstm_jax.cells.logspace import common_dtype
from xlstm_jax.data.batch import Batch
from xlstm_jax.errors import ArgumentError
from xlstm_jax.modules.initializers import random_key
from xlstm_jax.ops.cross_entropy import CrossEntropy
from xlstm_jax.train import guard, losses
from xlstm_jax.train.config import TrainConfig
from xlstm_jax.train.metrics import Metrics
from xlstm_jax.train.optimizer import ScheduledOptimizer, norm
from xlstm_jax.train.state import TrainState
from xlstm_jax.typing import Array, ArrayLike, Float, Int, PRNGKeyArray, PyTree

LossFn = Callable[[PyTree, Batch, PRNGKeyArray | None], tuple[Float[Array, ""], CrossEntropy]]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]

_DROPOUT = 1  # folded into the key of the seed, which itself initializes the parameters


def make_train_step(
    model: Any, tx: optax.GradientTransformation, cfg: TrainConfig, loss_fn: LossFn | None = None
) -> TrainStep:
    """Makes the train step `(state, batch) -> (state, metrics)`.

    The step is pure and not jitted: `jax.jit` it with the state donated, `jax.vmap` it over states
    with `in_axes=(0, None)` to train many seeds on the same batches, or `jax.lax.scan` it over
    batches.

    The metrics are scalars. `loss` is the mean cross entropy over all tokens, without the z-loss;
    `grad_norm` is measured before clipping; `skipped` is 1 if the guard skipped the update;
    `skipped_in_a_row` counts consecutive skipped updates; `lr` is absent unless `tx` is a result of
    `make_optimizer`.

    Args:
        model: an `LM`, or a module with the same call signature.
        tx: the result of `make_optimizer`, or any other optax transformation.
        cfg: gradient accumulation, guard and z-loss.
        loss_fn: the sums of a batch; None uses `losses.language_model_loss`.
    """

    def model_loss(params, batch, key):
        return losses.language_model_loss(model, params, batch, cfg, key)

    tx = optax.with_extra_args_support(tx)  # ignores step and lr_scale unless tx takes them

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = dropout_key(model, cfg, state.step)
        loss_of = loss_fn or model_loss
        grads, sums = sum_gradients(loss_of, state.params, batch, key, cfg.accumulation)
        # A batch without targets gives 0/0, which the guard skips.
        grads = jax.tree.map(lambda g: g / sums.weight_sum.astype(g.dtype), grads)
        loss = sums.ce_sum / sums.weight_sum
        grad_norm = norm(grads)
        ok, new_guard = guard.check_update(state.guard, state.step, loss, grad_norm, cfg)
        updates, opt_state = tx.update(
            grads, state.opt_state, state.params, step=state.step, lr_scale=state.lr_scale
        )
        params = guard.select(ok, optax.apply_updates(state.params, updates), state.params)
        new = state.replace(
            step=state.step + 1,  # also if skipped, so that the next batch is another one
            params=params,
            opt_state=guard.select(ok, opt_state, state.opt_state),
            guard=new_guard,
        )
        metrics = {
            "loss": loss,
            "z_loss": sums.z_sum / sums.weight_sum,
            "perplexity": jnp.exp(loss),
            "accuracy": sums.correct_sum / sums.weight_sum,
            "grad_norm": grad_norm,
            "update_norm": jnp.where(ok, norm(updates), 0.0),
            "param_norm": norm(params),
            "tokens": sums.weight_sum,
            # Documents are numbered from 1 in each sequence, so the largest id is their number.
            "documents": jnp.sum(jnp.max(batch.segment_ids, axis=-1)),
            "padding_fraction": jnp.mean(batch.segment_ids == 0),
            "skipped": 1 - ok.astype(jnp.int32),
            "skipped_in_a_row": new_guard.skipped,
        }
        if isinstance(tx, ScheduledOptimizer):
            metrics["lr"] = jnp.asarray(tx.schedule(state.step) * state.lr_scale)
        return new, metrics

    return train_step


def dropout_key(model: Any, cfg: TrainConfig, step: Int[ArrayLike, ""]) -> PRNGKeyArray | None:
    """The key of a step, a function of the seed and the step; None without dropout."""
    if not model.cfg.has_dropout:
        return None
    return jax.random.fold_in(jax.random.fold_in(random_key(cfg.seed), _DROPOUT), step)


def sum_gradients(
    loss_fn: LossFn, params: PyTree, batch: Batch, key: PRNGKeyArray | None, num_parts: int = 1
) -> tuple[PyTree, CrossEntropy]:
    """Gradients of the summed loss, and the sums, accumulated over `num_parts` micro-batches.

    Sums of micro-batches with different numbers of tokens add up to the sum of the batch; means do
    not.
    """
    grad_fn = jax.grad(loss_fn, has_aux=True)
    if num_parts == 1:
        return grad_fn(params, batch, key)
    num_sequences = len(batch.inputs)
    if num_sequences % num_parts:
        raise ArgumentError(
            f"a batch must have a multiple of {num_parts} sequences, got {num_sequences}; "
            f"change data.batch_size or train.accumulation={num_parts}."
        )
    # Strided, so that every micro-batch has sequences on every device.
    parts = jax.tree.map(
        lambda x: jnp.swapaxes(x.reshape((-1, num_parts) + x.shape[1:]), 0, 1), batch
    )
    shapes = jax.eval_shape(grad_fn, params, jax.tree.map(lambda x: x[0], parts), key)
    # Accumulated in float32 or wider, whatever the dtype of the parameters.
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, common_dtype(jnp.float32, s.dtype)), shapes)

    def body(total, index_and_part):
        index, part = index_and_part
        part_key = None if key is None else jax.random.fold_in(key, index)
        grads_and_sums = grad_fn(params, part, part_key)
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, grads_and_sums), None

    return jax.lax.scan(body, zeros, (jnp.arange(num_parts), parts))[0]
