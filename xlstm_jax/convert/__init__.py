"""Conversion of weights from and to other implementations."""

from xlstm_jax.convert.hf import load_hf, save_hf
from xlstm_jax.convert.large import load_large
from xlstm_jax.convert.push import push_hf
from xlstm_jax.convert.tensors import WeightsError
from xlstm_jax.convert.tirex import load_tirex
from xlstm_jax.convert.v1 import load_v1

__all__ = ["WeightsError", "load_hf", "load_large", "load_tirex", "load_v1", "push_hf", "save_hf"]
