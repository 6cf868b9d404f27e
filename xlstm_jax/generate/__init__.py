"""Text generation: prefill, then token-by-token decoding from a fixed-size state."""

from xlstm_jax.generate.decode import Generation, generate, stream
from xlstm_jax.generate.evaluators import sample_evaluator
from xlstm_jax.generate.export import export_model
from xlstm_jax.generate.exported import ExportedModel, load_exported
from xlstm_jax.generate.prefix_cache import PrefixCache
from xlstm_jax.generate.prepare import prepare_params
from xlstm_jax.generate.sampling import Sampler, greedy
from xlstm_jax.generate.session import Session
from xlstm_jax.generate.text import stream_text

__all__ = [
    "ExportedModel",
    "Generation",
    "PrefixCache",
    "Sampler",
    "Session",
    "export_model",
    "generate",
    "greedy",
    "load_exported",
    "prepare_params",
    "sample_evaluator",
    "stream",
    "stream_text",
]
