"""Sampling text from a trained model: prefill, then a token at a time from a fixed-size state."""

from xlstm_jax.generate.decode import Generation, generate, stream
from xlstm_jax.generate.sampling import Sampler, greedy

__all__ = ["Generation", "Sampler", "generate", "greedy", "stream"]
