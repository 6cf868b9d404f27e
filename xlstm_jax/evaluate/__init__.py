"""Evaluation of trained models on held-out data."""

from xlstm_jax.evaluate.perplexity import Perplexity, perplexity
from xlstm_jax.evaluate.position import Bucket, by_position

__all__ = ["Bucket", "Perplexity", "by_position", "perplexity"]
