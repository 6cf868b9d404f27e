"""Ahead-of-time compilation for TPUs and GPUs that are not attached, and what the compilers report.

`topologies` describes the hardware, `compiler` compiles for it, `schedules` reads what libtpu makes
of a TPU kernel and `resources` what Triton's assembler makes of a GPU kernel. Needs the compilers
(`pip install xlstm-jax[compile]`), no accelerator.
"""
