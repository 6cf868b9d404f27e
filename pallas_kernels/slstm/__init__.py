"""Kernels of the sLSTM: a scan over time with its gradient, and one step of decoding."""
