"""Evaluation of trained models: perplexity and bits per byte."""

from xlstm_jax.evaluate.evaluators import loss_evaluator, position_evaluator
from xlstm_jax.evaluate.perplexity import Perplexity, perplexity
from xlstm_jax.evaluate.position import Bucket, by_position

__all__ = [
    "Bucket",
    "Perplexity",
    "by_position",
    "loss_evaluator",
    "perplexity",
    "position_evaluator",
]
