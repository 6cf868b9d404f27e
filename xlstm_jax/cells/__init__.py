"""Recurrent cells: state, step and scan over time of the LSTM, sLSTM and mLSTM."""

from xlstm_jax.cells.lstm import LSTMState, lstm_init, lstm_scan, lstm_step
from xlstm_jax.cells.mlstm import MLSTMState, mlstm_init, mlstm_scan, mlstm_step
from xlstm_jax.cells.slstm import SLSTMState, slstm_init, slstm_scan, slstm_step

__all__ = [
    "LSTMState",
    "MLSTMState",
    "SLSTMState",
    "lstm_init",
    "lstm_scan",
    "lstm_step",
    "mlstm_init",
    "mlstm_scan",
    "mlstm_step",
    "slstm_init",
    "slstm_scan",
    "slstm_step",
]
