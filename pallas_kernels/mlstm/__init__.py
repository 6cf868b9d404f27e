"""Kernels of the mLSTM: chunks of a sequence, and one step."""
