"""Recurrent layers with the argument names of `torch.nn.LSTM`: LSTM, sLSTM, mLSTM."""

from xlstm_jax.compat.layers import LSTM, MLSTM, SLSTM, Bidirectional, State
from xlstm_jax.compat.torch_weights import from_torch, to_torch

__all__ = ["LSTM", "MLSTM", "SLSTM", "Bidirectional", "State", "from_torch", "to_torch"]
