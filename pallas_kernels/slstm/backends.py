"""The sLSTM kernels of each backend, imported on first use."""

import functools

from pallas_kernels.slstm.options import Kernels, Layout


@functools.cache
def tpu() -> Kernels:
    """Pallas kernels for TPUs."""
    from pallas_kernels.slstm import tpu_decode, tpu_kernels, tpu_layout, tpu_tiles

    return Kernels(
        refusal=tpu_tiles.refusal,
        tile=tpu_tiles.choose,
        layout=Layout("THBK,HKJ->THBJ", "THBK,THBJ->HKJ", (0, 2)),
        pad=tpu_layout.pad,
        unpad=tpu_layout.unpad,
        forward=tpu_kernels.forward,
        h_before=lambda h, flags: h,  # the TPU kernel saves h after resets
        backward=tpu_kernels.backward,
        step=tpu_decode.step,
        supports_step=tpu_tiles.step_fits,
    )


@functools.cache
def triton() -> Kernels:
    """Triton kernels for NVIDIA GPUs."""
    from pallas_kernels.slstm import triton_calls, triton_decode, triton_tiles

    return Kernels(
        refusal=triton_tiles.refusal,
        tile=triton_tiles.choose,
        layout=Layout("BTHK,HKGJ->BTGHJ", "BTHK,BTGHJ->HKGJ", (0, 1)),
        pad=triton_calls.pad,
        unpad=triton_calls.unpad,
        forward=triton_calls.forward,
        h_before=triton_calls.h_before,
        backward=triton_calls.backward,
        step=triton_decode.step,
        supports_step=lambda tile, x, r: True,
    )
