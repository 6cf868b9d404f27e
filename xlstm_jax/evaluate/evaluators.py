"""Evaluators of `train.fit` that measure losses."""

from typing import Any

from xlstm_jax.data.batch import Examples
from xlstm_jax.evaluate.perplexity import perplexity
from xlstm_jax.evaluate.position import by_position
from xlstm_jax.modules.lm import LM
from xlstm_jax.train.evaluators import Evaluator
from xlstm_jax.typing import PyTree


def loss_evaluator(
    name: str, model: LM, windows: Examples, *, every: int | None = None, **options: Any
) -> Evaluator:
    """Records `NAME_loss`, `NAME_tokens` and, for text, `NAME_bits_per_byte` of any data.

    `options` are those of `perplexity`.
    """

    def evaluate(params: PyTree, step: int) -> dict[str, float]:
        result = perplexity(model, {"params": params}, windows, **options)
        metrics = {"loss": result.nats_per_token, "tokens": result.num_tokens}
        bits = result.bits_per_byte
        return metrics if bits is None else metrics | {"bits_per_byte": bits}

    return Evaluator(name, evaluate, every)


def position_evaluator(
    name: str, model: LM, windows: Examples, *, every: int | None = None, **options: Any
) -> Evaluator:
    """Records `NAME_loss_START` for the positions of each bucket of `by_position`.

    `options` are those of `by_position`.
    """

    def evaluate(params: PyTree, step: int) -> dict[str, float]:
        buckets = by_position(model, {"params": params}, windows, **options)
        return {f"loss_{b.start}": b.nats_per_token for b in buckets}

    return Evaluator(name, evaluate, every)
