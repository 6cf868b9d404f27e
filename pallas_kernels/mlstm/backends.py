"""The mLSTM kernels of each backend, imported on first use."""

import functools
from collections.abc import Callable

from pallas_kernels.mlstm.options import Kernels


@functools.cache
def tpu() -> Kernels:
    """Pallas kernels for TPUs."""
    from pallas_kernels.mlstm import tpu_backward, tpu_decode, tpu_forward, tpu_layout, tpu_tiles

    return Kernels(
        refusal=tpu_tiles.refusal,
        tile=tpu_tiles.choose,
        widths=tpu_layout.padded_widths,
        forward=tpu_forward.mlstm_forward,
        backward=tpu_backward.mlstm_backward,
        step=tpu_decode.step,
        supports_step=tpu_decode.fits_vmem,
        zeros_as_none=True,
    )


@functools.cache
def triton() -> Kernels:
    """Triton kernels for NVIDIA GPUs."""
    from pallas_kernels import gpu
    from pallas_kernels.mlstm import triton_calls, triton_decode, triton_tiles

    return Kernels(
        refusal=triton_tiles.refusal,
        tile=triton_tiles.choose,
        widths=_each(gpu.width),
        forward=triton_calls.forward,
        backward=triton_calls.backward,
        step=triton_decode.step,
        supports_step=lambda K, V: True,  # incomplete blocks are masked
        zeros_as_none=False,
    )


@functools.cache
def mosaic_gpu() -> Kernels:
    """Mosaic GPU kernels for Hopper GPUs."""
    from pallas_kernels.mlstm import mosaic_calls, mosaic_tiles

    def step(*args):
        raise NotImplementedError("a step is computed as a chunk")

    return Kernels(
        refusal=mosaic_tiles.refusal,
        tile=mosaic_tiles.choose,
        widths=_each(mosaic_tiles.width),
        forward=mosaic_calls.forward,
        backward=mosaic_calls.backward,
        step=step,
        supports_step=lambda K, V: False,
        zeros_as_none=False,
    )


def _each(width: Callable[[int, int], int]) -> Callable[[int, int, int, int], tuple[int, int]]:
    """`Kernels.widths` from a function of one width."""
    return lambda H, K, V, lanes: (width(K, lanes), width(V, lanes))
