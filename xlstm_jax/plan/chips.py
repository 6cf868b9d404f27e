"""What the data sheets say of accelerators: peaks of computing, memory and network.

TPUs: Google Cloud's page of each version. GPUs: NVIDIA's data sheet of each module, and the network
of its reference systems. All of it is per chip and per second.
"""

from typing import NamedTuple

from xlstm_jax.plan import gpus


class Chip(NamedTuple):
    """One kind of accelerator."""

    target: str  # what kernels are compiled for; a key of `pallas_kernels.common.compiled_for`
    flops: float  # bfloat16, dense
    memory: int  # bytes
    memory_rate: float
    near_rate: float  # bytes sent to chips of the same slice or host, all links in one direction
    far_rate: float  # bytes sent to others
    device: str = ""  # of `gpus.DEVICES`
    parts: int = 1  # devices of JAX, each with its share of all this


GIB = 2**30

TPUS = {
    "v4": Chip("v4", 275e12, 32 * GIB, 1.228e12, 300e9, 6.25e9),
    "v5e": Chip("v5e", 197e12, 16 * GIB, 0.819e12, 200e9, 3.125e9),
    "v5p": Chip("v5p", 459e12, 95 * GIB, 2.765e12, 600e9, 6.25e9),
    "v6e": Chip("v6e", 918e12, 32 * GIB, 1.638e12, 400e9, 12.5e9),
    "v7x": Chip("v7x", 2307e12, 192 * GIB, 7.38e12, 600e9, 12.5e9, parts=2),
}
"""A slice of a pod is one network; far is the data centre's."""

_NETWORK = {"A100": (300e9, 25e9), "H100": (450e9, 50e9), "H200": (450e9, 50e9)}
_NETWORK |= {"B200": (900e9, 50e9)}

GPUS = {
    name.lower(): Chip(
        f"sm_{device.capability}",
        device.bf16_flops,
        device.memory_gb * 10**9,
        device.bytes_per_second,
        *_NETWORK[name],
        device=name,
    )
    for name, device in gpus.DEVICES.items()
    if name in _NETWORK
}
"""Within a host NVLink, between hosts one InfiniBand port a GPU."""
