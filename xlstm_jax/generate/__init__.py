"""Text generation: prefill, then token-by-token decoding from a fixed-size state."""

from xlstm_jax.generate.decode import Generation, generate, stream
from xlstm_jax.generate.evaluators import sample_evaluator
from xlstm_jax.generate.prepare import prepare_params
from xlstm_jax.generate.sampling import Sampler, greedy

__all__ = [
    "Generation",
    "Sampler",
    "generate",
    "greedy",
    "prepare_params",
    "sample_evaluator",
    "stream",
]
