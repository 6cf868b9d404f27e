"""One update of the parameters: a pure function of a state and a batch."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from xlstm_jax.data.batch import Batch
from xlstm_jax.ops.cross_entropy import CrossEntropy
from xlstm_jax.train import guard, losses
from xlstm_jax.train.config import TrainConfig
from xlstm_jax.train.metrics import Metrics
from xlstm_jax.train.optimizer import make_schedule, norm
from xlstm_jax.train.state import TrainState
from xlstm_jax.typing import Array, Float, PRNGKeyArray, PyTree

LossFn = Callable[[PyTree, Batch, PRNGKeyArray | None], tuple[Float[Array, ""], CrossEntropy]]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]

_DROPOUT = 1  # the purposes that share a seed: parameters use the key itself, dropout this fold


def make_train_step(
    model: Any,
    tx: optax.GradientTransformation,
    cfg: TrainConfig,
    loss_fn: LossFn | None = None,
) -> TrainStep:
    """The step function `(state, batch) -> (state, metrics)`.

    It is pure and not jitted: `jax.jit` it with the state donated, `jax.vmap` it over states with
    `in_axes=(0, None)` to train many seeds on the same batches, `jax.lax.scan` it over batches.

    Args:
        model: an `LM` or what is called like one.
        tx: from `make_optimizer`, or any other transformation of optax.
        cfg: accumulation, guard, z-loss.
        loss_fn: sums of a batch; None takes `losses.language_model_loss`.

    The metrics are scalars. `loss` is the mean cross entropy over all tokens, without the z-loss;
    `grad_norm` precedes clipping; `skipped` is 1 where the guard discarded the update.
    """
    loss_of = loss_fn or (lambda p, b, key: losses.language_model_loss(model, p, b, cfg, key))
    tx = optax.with_extra_args_support(tx)
    schedule = make_schedule(cfg)
    judge = functools.partial(
        guard.judge,
        factor=cfg.guard_factor,
        floor=cfg.guard_floor,
        max_skips=cfg.max_consecutive_skips,
    )
    has_dropout = model.cfg.has_dropout

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = dropout_key(cfg.seed, state.step) if has_dropout else None
        grads, sums = sum_gradients(loss_of, state.params, batch, key, cfg.accumulation)
        # A batch without any target has the mean 0/0: the guard discards it.
        grads = jax.tree.map(lambda g: g / sums.weight_sum.astype(g.dtype), grads)
        loss = sums.ce_sum / sums.weight_sum
        grad_norm = norm(grads)
        ok, watched = judge(state.guard, loss, grad_norm)
        updates, opt_state = tx.update(
            grads, state.opt_state, state.params, step=state.step, lr_scale=state.lr_scale
        )
        params = guard.keep_if(ok, optax.apply_updates(state.params, updates), state.params)
        new = state.replace(
            step=state.step + 1,
            params=params,
            opt_state=guard.keep_if(ok, opt_state, state.opt_state),
            guard=watched,
        )
        metrics = _of_batch(batch, sums) | {
            "lr": jnp.asarray(schedule(state.step) * state.lr_scale),
            "grad_norm": grad_norm,
            "update_norm": jnp.where(ok, norm(updates), 0.0),
            "param_norm": norm(params),
            "skipped": 1 - ok.astype(jnp.int32),
            "skipped_in_a_row": watched.skipped,
        }
        return new, metrics

    return train_step


def _of_batch(batch: Batch, sums: CrossEntropy) -> Metrics:
    """The metrics that do not depend on the update."""
    loss = sums.ce_sum / sums.weight_sum
    return {
        "loss": loss,
        "z_loss": sums.z_sum / sums.weight_sum,
        "perplexity": jnp.exp(loss),
        "accuracy": sums.correct_sum / sums.weight_sum,
        "tokens": sums.weight_sum,
        "documents": jnp.sum(jnp.max(batch.segment_ids, axis=-1)),
        "padding_fraction": jnp.mean(batch.segment_ids == 0),
    }


def dropout_key(seed: int, step: Array) -> PRNGKeyArray:
    """The key of a step: from the seed and the step alone, so that there is none to store."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _DROPOUT), step)


def sum_gradients(
    loss_fn: LossFn,
    params: PyTree,
    batch: Batch,
    key: PRNGKeyArray | None,
    num_parts: int = 1,
) -> tuple[PyTree, CrossEntropy]:
    """Gradients of the summed loss, and the sums, over `num_parts` micro-batches in turn.

    Sums over parts of unequal weight add up to the sum over the batch; means would not.
    """
    grad_fn = jax.grad(loss_fn, has_aux=True)
    if num_parts == 1:
        return grad_fn(params, batch, key)
    parts = jax.tree.map(functools.partial(_split_rows, num_parts=num_parts), batch)
    shapes = jax.eval_shape(grad_fn, params, jax.tree.map(lambda x: x[0], parts), key)
    zeros = jax.tree.map(
        lambda s: jnp.zeros(s.shape, jnp.promote_types(s.dtype, jnp.float32)), shapes
    )

    def body(total, now):
        number, part = now
        part_key = None if key is None else jax.random.fold_in(key, number)
        grads_and_sums = grad_fn(params, part, part_key)
        return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, grads_and_sums), None

    (grads, sums), _ = jax.lax.scan(body, zeros, (jnp.arange(num_parts), parts))
    return grads, sums


def _split_rows(x: Array, *, num_parts: int) -> Array:
    if x.shape[0] % num_parts:
        raise ValueError(
            f"a batch must have a multiple of {num_parts} sequences, got {x.shape[0]}; "
            f"change data.batch_size or train.accumulation={num_parts}."
        )
    # Every part has sequences of every device.
    return jnp.swapaxes(x.reshape((-1, num_parts) + x.shape[1:]), 0, 1)
