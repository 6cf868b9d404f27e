"""Next-token cross entropy, as sums over a batch or over an evaluation."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from xlstm_jax.data.batch import Batch, Examples
from xlstm_jax.modules.lm import head_kernel
from xlstm_jax.ops.cross_entropy import CrossEntropy, cross_entropy
from xlstm_jax.ops.int8 import Int8Kernel
from xlstm_jax.train.config import TrainConfig
from xlstm_jax.typing import Array, Float, PRNGKeyArray, PyTree


def language_model_loss(
    model: Any,
    params: PyTree,
    batch: Batch,
    cfg: TrainConfig,
    dropout_key: PRNGKeyArray | None = None,
) -> tuple[Float[Array, ""], CrossEntropy]:
    """The sum to differentiate (cross entropy plus z-loss) and its parts.

    The train step divides by the number of tokens, after summing micro-batches and devices.
    """
    loss, (sums, _) = stateful_loss(model, params, batch, cfg, dropout_key)
    return loss, sums


def stateful_loss(
    model: Any,
    params: PyTree,
    batch: Batch,
    cfg: TrainConfig,
    dropout_key: PRNGKeyArray | None = None,
    state: Any = None,
) -> tuple[Float[Array, ""], tuple[CrossEntropy, Any]]:
    """`language_model_loss` from a state of the model, with the state after the batch."""
    sums, state = token_sums(
        model,
        params,
        batch,
        document_resets=cfg.document_resets,
        state=state,
        dropout_key=dropout_key,
        z_loss=cfg.z_loss,
        chunk_size=cfg.loss_chunk,
    )
    return sums.ce_sum + sums.z_sum, (sums, state)


def token_sums(
    model: Any,
    params: PyTree,
    batch: Batch,
    *,
    document_resets: bool,
    state: Any = None,
    dropout_key: PRNGKeyArray | None = None,
    z_loss: float = 0.0,
    chunk_size: int | None = None,
) -> tuple[CrossEntropy, Any]:
    """Cross entropy summed over the targets of a batch, and the model's state after it.

    Args:
        model: an `LM`, or a module with the same call signature.
        batch: sequences; `segment_ids` separate the documents packed into one.
        document_resets: whether a document starts from the initial state.
        state: the state before the batch; None is the initial state.
        dropout_key: None disables dropout.
        z_loss: coefficient of the squared log-normalizer.
        chunk_size: positions per chunk of logits; None lets the op choose.
    """
    # Padding becomes a document of its own with weight 0, so it needs no mask.
    documents = jnp.where(batch.segment_ids == 0, -1, batch.segment_ids)
    hidden, state = model.apply(
        {"params": params},
        batch.inputs,
        state=state,
        segment_ids=documents if document_resets else None,
        has_padding=False,
        head=False,
        deterministic=dropout_key is None,
        rngs={} if dropout_key is None else {"dropout": dropout_key},
    )
    head = head_kernel(model.cfg, params)
    sums = cross_entropy(
        hidden,
        head.dequantize() if isinstance(head, Int8Kernel) else head,
        batch.targets,
        batch.weights,
        soft_cap=model.cfg.logit_soft_cap,
        z_loss=z_loss,
        chunk_size=chunk_size,
    )
    return sums, state


class EvalSums(NamedTuple):
    """Sums over the batches of an evaluation.

    Python numbers, because a float32 sum loses precision over millions of tokens.
    """

    nats: float = 0.0
    num_tokens: int = 0
    num_correct: int = 0
    num_bytes: int = 0  # of the text of the targets; 0 if they are not text

    def plus(self, sums: CrossEntropy, batch: Batch, examples: Examples) -> "EvalSums":
        """The sums including one more batch, drawn from `examples`."""
        sums = jax.device_get(sums)  # one transfer for all leaves
        num_bytes, tokenizer = 0, getattr(examples, "tokenizer", None)  # samples of tasks have none
        if tokenizer is not None:
            num_bytes = tokenizer.num_bytes(batch.targets[batch.weights > 0])
        return EvalSums(
            self.nats + float(sums.ce_sum),
            self.num_tokens + int(sums.weight_sum),
            self.num_correct + int(sums.correct_sum),
            self.num_bytes + num_bytes,
        )

    @property
    def nats_per_token(self) -> float:
        """Mean cross entropy per target."""
        return self.nats / self.num_tokens

    @property
    def bits_per_byte(self) -> float | None:
        """Cross entropy per byte of text, comparable across tokenizers; None without text."""
        return self.nats / math.log(2) / self.num_bytes if self.num_bytes else None
