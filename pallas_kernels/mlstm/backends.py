"""The mLSTM's kernels by kind of chip, imported when they are asked for."""

import functools

from pallas_kernels import common
from pallas_kernels.mlstm.options import Kernels


@functools.cache
def tpu() -> Kernels:
    """Pallas kernels for TPUs."""
    from pallas_kernels import tiles
    from pallas_kernels.mlstm import decode, tpu_backward, tpu_forward

    return Kernels(
        tile=tiles.mlstm,
        width=common.round_up,
        forward=tpu_forward.mlstm_forward,
        backward=tpu_backward.mlstm_backward,
        step=decode.mlstm_decode,
        takes_step=decode.fits_vmem,
    )


@functools.cache
def triton() -> Kernels:
    """Triton kernels for NVIDIA GPUs."""
    from pallas_kernels.mlstm import triton_calls, triton_decode, triton_tiles

    return Kernels(
        tile=triton_tiles.mlstm,
        width=triton_tiles.width,
        forward=triton_calls.forward,
        backward=triton_calls.backward,
        step=triton_decode.step,
        takes_step=triton_decode.takes,
    )
