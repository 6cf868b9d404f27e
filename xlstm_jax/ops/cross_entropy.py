"""Cross entropy of a linear head, in chunks, so that the full logits are never in memory."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import export

from xlstm_jax.cells.logspace import state_dtype
from xlstm_jax.cells.time import vary_like
from xlstm_jax.ops import dispatch
from xlstm_jax.ops.checks import check_chunk_size, check_shapes
from xlstm_jax.ops.dense import dense
from xlstm_jax.ops.norm import soft_cap as apply_soft_cap
from xlstm_jax.ops.sharded.any_mesh import on_any_mesh
from xlstm_jax.ops.sharded.parameters import sum_over_devices
from xlstm_jax.typing import Array, Bool, Float, Int

CHUNK_LOGITS = {"cpu": 2**20, "tpu": 2**26, "gpu": 2**26}
"""Logits per chunk when `chunk_size` is None. On a CPU, 4 MiB in float32, to fit the cache.
On an accelerator every chunk reads all weights and accumulates into their full gradient: below a
thousand positions per chunk, memory bandwidth is the bottleneck. With chunks of 20 positions a step
of a 160M model with 50,304 logits moved 134 GiB per chip of a v5e 4x4, with these 44 (compiled)."""


class CrossEntropy(NamedTuple):
    """Weighted sums over positions; divide by `weight_sum` for a mean."""

    ce_sum: Float[Array, ""]  # nats
    z_sum: Float[Array, ""]  # z_loss * logsumexp^2
    weight_sum: Float[Array, ""]
    correct_sum: Float[Array, ""]  # positions whose largest logit is the target


export.register_namedtuple_serialization(CrossEntropy, serialized_name="xlstm_jax.CrossEntropy")


@on_any_mesh(CrossEntropy._make(("", "", "", "")))
def cross_entropy(
    x: Float[Array, "B T D"],
    kernel: Float[Array, "D vocab"],
    targets: Int[Array, "B T"],
    weights: Float[Array, "B T"],
    *,
    soft_cap: float | None = None,
    z_loss: float = 0.0,
    chunk_size: int | None = None,
) -> CrossEntropy:
    """Cross entropy between softmax(soft_cap(x @ kernel)) and `targets`.

    Args:
        x: hidden states after the final norm.
        kernel: weights of the head.
        targets: token ids; any valid id where the weight is 0.
        soft_cap: bound on the logits, that of the model.
        z_loss: coefficient of the squared log-normalizer; its sum is separate (`z_sum`).
        chunk_size: positions per chunk, forward and backward, on each device; changes memory and
            speed only. None: 2**20 logits per chunk on a CPU, 2**26 elsewhere.

    Returns sums in float32 or wider; gradients flow to `x` and `kernel`.

    Raises:
        ValueError: inconsistent shapes, or a chunk size below 1.
    """
    sizes = check_shapes(
        "cross_entropy",
        {
            "x": (x, "B T D"),
            "kernel": (kernel, "D vocab"),
            "targets": (targets, "B T"),
            "weights": (weights, "B T"),
        },
    )
    check_chunk_size("cross_entropy", chunk_size)
    chunk_size = chunk_size or max(1, CHUNK_LOGITS[dispatch.platform()] // sizes["vocab"])
    chunk_sums = functools.partial(_chunk_sums, soft_cap=soft_cap, z_loss=z_loss)
    local_sums = functools.partial(_local_sums, chunk_sums, chunk_size)
    return sum_over_devices(local_sums, x, kernel, targets, weights)


class TokenLosses(NamedTuple):
    """The parts of a cross entropy by position."""

    nats: Float[Array, "B T"]  # -log p(target)
    correct: Bool[Array, "B T"]  # the largest logit is that of the target


@on_any_mesh(TokenLosses._make(("B T", "B T")))
def token_losses(
    x: Float[Array, "B T D"],
    kernel: Float[Array, "D vocab"],
    targets: Int[Array, "B T"],
    *,
    soft_cap: float | None = None,
    chunk_size: int | None = None,
) -> TokenLosses:
    """As `cross_entropy`, but for each position; without a z-loss."""
    sizes = check_shapes(
        "token_losses",
        {"x": (x, "B T D"), "kernel": (kernel, "D vocab"), "targets": (targets, "B T")},
    )
    check_chunk_size("token_losses", chunk_size)
    chunk_size = chunk_size or max(1, CHUNK_LOGITS[dispatch.platform()] // sizes["vocab"])
    chunks = _in_chunks(chunk_size, x, targets)
    losses = jax.lax.map(lambda xs: _of_positions(kernel, xs[0], xs[1], soft_cap), chunks)
    flat = (losses[n].reshape(-1)[: targets.size] for n in (0, 2))
    return TokenLosses(*(a.reshape(targets.shape) for a in flat))


def _local_sums(chunk_sums, chunk_size: int, x, kernel, targets, weights) -> CrossEntropy:
    """Sums over the positions of one device."""
    # Positions are padded to full chunks with weight 0. The backward pass rematerializes logits,
    # so only those of one chunk are in memory.
    chunks = _in_chunks(chunk_size, x, targets, weights)
    if chunks[1].shape[0] == 1:
        return chunk_sums(kernel, *(a[0] for a in chunks))
    body = jax.checkpoint(
        lambda total, xs: (jax.tree.map(jnp.add, total, chunk_sums(kernel, *xs)), None)
    )
    zero = jnp.zeros((), state_dtype(x, kernel))
    totals = vary_like(CrossEntropy(zero, zero, zero, zero), (kernel, chunks))
    total, _ = jax.lax.scan(body, totals, chunks)
    return total


def _in_chunks(chunk_size: int, x, *by_position) -> tuple[Array, ...]:
    """Positions `B T` as `N L`, padded with zeros to full chunks of at most `chunk_size`."""
    positions = by_position[0].size
    # `jax.export` may trace with a symbolic number of positions, which cannot be compared.
    chunk = min(positions, chunk_size) if isinstance(positions, int) else chunk_size
    flat = x.reshape(positions, -1), *(a.reshape(-1) for a in by_position)
    num_chunks = -(-positions // chunk)
    pad = num_chunks * chunk - positions
    padded = (jnp.pad(a, ((0, pad),) + ((0, 0),) * (a.ndim - 1)) for a in flat)
    return tuple(a.reshape((num_chunks, chunk) + a.shape[1:]) for a in padded)


def _chunk_sums(kernel, x, targets, weights, *, soft_cap, z_loss) -> CrossEntropy:
    nats, log_norm, correct = _of_positions(kernel, x, targets, soft_cap)
    weights = weights.astype(nats.dtype)
    return CrossEntropy(
        jnp.sum(weights * nats),
        jnp.sum(weights * z_loss * jnp.square(log_norm)),
        jnp.sum(weights),
        jnp.sum(weights * correct.astype(nats.dtype)),
    )


def _of_positions(kernel, x, targets, cap: float | None) -> tuple[Array, Array, Array]:
    """Cross entropy, log-normalizer, and whether the target has the largest logit."""
    logits = apply_soft_cap(dense(x, kernel, dtype=state_dtype(x, kernel)), cap)
    log_norm = jax.nn.logsumexp(logits, axis=-1)
    # A one-hot select, not a gather: its gradient is elementwise, not a scatter.
    vocab = jnp.arange(logits.shape[-1], dtype=targets.dtype)[None]
    target_logit = jnp.sum(jnp.where(vocab == targets[:, None], logits, 0), axis=-1)
    # Same result as argmax, which is slow on a CPU: of equal logits the first one counts.
    ties = (logits == target_logit[:, None]) & (vocab >= targets[:, None])
    not_larger = (logits < target_logit[:, None]) | ties
    correct = jnp.sum(not_larger, axis=-1) == logits.shape[-1]
    return log_norm - target_logit, log_norm, correct
