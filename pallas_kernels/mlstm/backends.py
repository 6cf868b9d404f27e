"""The mLSTM kernels of each backend, imported on first use."""

import functools
from collections.abc import Callable

from pallas_kernels.mlstm.options import Kernels


@functools.cache
def tpu() -> Kernels:
    """Pallas kernels for TPUs."""
    from pallas_kernels.mlstm import (
        packing,
        tpu_backward,
        tpu_decode,
        tpu_forward,
        tpu_layout,
        tpu_tiles,
    )

    return Kernels(
        refusal=tpu_tiles.refusal,
        tile=tpu_tiles.choose,
        widths=tpu_layout.padded_widths,
        pack_forward=packing.forward,
        pack_backward=packing.backward,
        gate_grads=packing.gate_grads,
        forward=tpu_forward.mlstm_forward,
        backward=tpu_backward.mlstm_backward,
        step=tpu_decode.step,
        supports_step=tpu_decode.fits_vmem,
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
        pack_forward=triton_calls.pack_forward,
        pack_backward=triton_calls.pack_backward,
        gate_grads=triton_calls.gate_grads,
        forward=triton_calls.forward,
        backward=triton_calls.backward,
        step=triton_decode.step,
        supports_step=lambda K, V: True,  # incomplete blocks are masked
    )


@functools.cache
def mosaic_gpu() -> Kernels:
    """Mosaic GPU kernels for Hopper GPUs."""
    from pallas_kernels.mlstm import mosaic_calls, mosaic_tiles, packing

    def step(*args):
        raise NotImplementedError("a step is computed as a chunk")

    return Kernels(
        refusal=mosaic_tiles.refusal,
        tile=mosaic_tiles.choose,
        widths=_each(mosaic_tiles.width),
        pack_forward=packing.forward,
        pack_backward=packing.backward_with_sums,
        gate_grads=packing.gate_grads,
        forward=mosaic_calls.forward,
        backward=mosaic_calls.backward,
        step=step,
        supports_step=lambda K, V: False,
    )


def _each(width: Callable[[int, int], int]) -> Callable[[int, int, int, int], tuple[int, int]]:
    """`Kernels.widths` from a function of one width."""
    return lambda H, K, V, lanes: (width(K, lanes), width(V, lanes))
