"""Tasks whose samples are computed, not read: sample i is a function of (seed, split, i)."""

from xlstm_jax.data.synthetic import parity
from xlstm_jax.data.synthetic.samples import Samples

__all__ = ["Samples", "parity"]
