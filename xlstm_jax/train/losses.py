"""Next-token loss as sums over a batch, to be divided once."""

from typing import Any

import jax.numpy as jnp

from xlstm_jax import ops
from xlstm_jax.data import Batch
from xlstm_jax.modules import head_kernel
from xlstm_jax.ops import CrossEntropy
from xlstm_jax.train.config import TrainConfig
from xlstm_jax.typing import Array, Float, PRNGKeyArray, PyTree


def language_model_loss(
    model: Any,
    params: PyTree,
    batch: Batch,
    cfg: TrainConfig,
    dropout_key: PRNGKeyArray | None = None,
) -> tuple[Float[Array, ""], CrossEntropy]:
    """The sum to be differentiated, cross entropy and z-loss, and its parts.

    Sums, not means: only whoever knows all micro-batches and devices may divide. The logits are
    made from hidden states a chunk at a time.

    Args:
        model: an `LM` or what is called like one.
        params: its parameters.
        batch: rows; documents that share a row are told apart by `segment_ids`.
        cfg: z-loss, chunk size, and whether a document starts from empty memory.
        dropout_key: None computes without dropout.
    """
    rngs = {} if dropout_key is None else {"dropout": dropout_key}
    # Padding weighs nothing: as a document of its own it needs no masks.
    documents = jnp.where(batch.segment_ids == 0, -1, batch.segment_ids)
    hidden, _ = model.apply(
        {"params": params},
        batch.inputs,
        segment_ids=documents if cfg.document_resets else None,
        has_padding=False,
        head=False,
        deterministic=dropout_key is None,
        rngs=rngs,
    )
    sums = ops.cross_entropy(
        hidden,
        head_kernel(model.cfg, params),
        batch.targets,
        batch.weights,
        soft_cap=model.cfg.logit_soft_cap,
        z_loss=cfg.z_loss,
        chunk_size=cfg.loss_chunk,
    )
    return sums.ce_sum + sums.z_sum, sums
