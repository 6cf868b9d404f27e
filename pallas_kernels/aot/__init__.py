"""Ahead-of-time (AOT) compilation for TPUs and GPUs that are not attached.

`topologies` describes the hardware and `compiler` compiles for it. `schedules` reads libtpu's
schedules of TPU kernels; `resources` reports registers, spills and memory of GPU kernels. Requires
the compilers (`pip install xlstm-jax[compile]`) but no accelerator.
"""
