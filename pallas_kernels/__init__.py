"""Accelerator kernels for the xLSTM recurrences; they take and return arrays.

The package does not depend on `xlstm_jax`. Importing it imports no submodule and needs no device.
"""
