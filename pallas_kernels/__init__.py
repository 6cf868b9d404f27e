"""Kernels for the recurrences of xLSTM: arrays in, arrays out, nothing of `xlstm_jax` inside.

Importing this package imports nothing else, so it costs nothing and needs no device.
"""
