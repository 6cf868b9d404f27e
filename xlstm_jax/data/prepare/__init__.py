"""Preparation: raw files to shards of tokens, in many processes and resumable."""

from xlstm_jax.data.prepare.config import PrepareConfig
from xlstm_jax.data.prepare.progress import Progress
from xlstm_jax.data.prepare.run import Result, prepare

__all__ = ["PrepareConfig", "Progress", "Result", "prepare"]
