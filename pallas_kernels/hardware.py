"""Data-sheet figures of accelerators, the one table for tiles, plans and benchmarks.

Sources: for TPUs Google Cloud's page of each version; for GPUs NVIDIA's data sheet of each module
(SXM) and the network of its reference systems. Rates are per chip and second; figures per core are
derived from them.
"""

import re
from typing import Any, NamedTuple

MIB, GIB = 1 << 20, 1 << 30


class Tpu(NamedTuple):
    """One TPU chip."""

    target: str  # key in `TPUS`: the compilation target
    flops: float  # bfloat16, dense
    hbm_bytes: int
    hbm_bandwidth: float
    intra_bandwidth: float  # sent to chips of the same slice, all links in one direction
    inter_bandwidth: float  # sent to other slices, over the data-center network
    cores: int  # TensorCores; a kernel runs on one and uses its VMEM
    devices: int  # JAX devices; on v4 and v5p both cores form one device
    vmem_bytes: int  # per core
    matrix_unit: int  # side of one MXU
    flops_per_bundle: int  # of all MXUs of a core

    @property
    def core_flops(self) -> float:
        """Peak bfloat16 FLOP/s of one core."""
        return self.flops / self.cores

    @property
    def core_hbm_bandwidth(self) -> float:
        """Bytes per second of HBM for each core, if they share it evenly."""
        return self.hbm_bandwidth / self.cores

    @property
    def clock(self) -> float:
        """Scheduled bundles per second of one core."""
        return self.core_flops / self.flops_per_bundle


class Gpu(NamedTuple):
    """One NVIDIA GPU; for data-center products the module with the most memory."""

    flops: float  # bfloat16, dense, accumulated in float32
    hbm_bytes: int
    hbm_bandwidth: float
    intra_bandwidth: float  # within a host, NVLink; 0: no reference system has a network for it
    inter_bandwidth: float  # between hosts, one InfiniBand port per GPU
    tf32_flops: float
    capability: int  # compute capability, times ten
    multiprocessors: int
    float32_lanes: int  # per multiprocessor
    threads: int  # resident threads per multiprocessor, at most
    shared_kib: int  # shared memory per multiprocessor; a program can use 1 KiB less
    l2_mib: int
    clock_ghz: float

    @property
    def target(self) -> str:
        """Key in `ARCHITECTURES`: the compilation target."""
        return f"sm_{self.capability}"

    @property
    def shared_bytes(self) -> int:
        """Shared memory that one program can use."""
        return (self.shared_kib - 1) << 10

    @property
    def has_wide_products(self) -> bool:
        """Whether warp groups multiply matrices straight from shared memory (wgmma, tcgen05)."""
        return 90 <= self.capability < 120


TPUS = {
    "v4": Tpu("v4", 275e12, 32 * GIB, 1.228e12, 300e9, 6.25e9, 2, 1, 16 * MIB, 128, 131_072),
    "v5e": Tpu("v5e", 197e12, 16 * GIB, 0.819e12, 200e9, 3.125e9, 1, 1, 128 * MIB, 128, 131_072),
    "v5p": Tpu("v5p", 459e12, 95 * GIB, 2.765e12, 600e9, 6.25e9, 2, 1, 64 * MIB, 128, 131_072),
    "v6e": Tpu("v6e", 918e12, 32 * GIB, 1.638e12, 400e9, 12.5e9, 1, 1, 128 * MIB, 256, 524_288),
    "v7x": Tpu("v7x", 2307e12, 192 * GIB, 7.38e12, 600e9, 12.5e9, 2, 2, 64 * MIB, 256, 524_288),
}

TPU_DEVICE_KINDS = {"TPU v4": "v4", "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v5": "v5p"}
TPU_DEVICE_KINDS |= {"TPU v5p": "v5p", "TPU v6 lite": "v6e", "TPU v6e": "v6e"}
TPU_DEVICE_KINDS |= {"TPU7x": "v7x", "TPU7": "v7x"}
"""`device_kind` as JAX reports it -> key in `TPUS`."""

_A100 = (80, 108, 64, 2048, 164, 40, 1.41)
_HOPPER = (90, 132, 128, 2048, 228, 50, 1.98)
_B200 = (100, 148, 128, 2048, 228, 126, 1.96)
_A10 = (86, 72, 128, 1536, 100, 6, 1.70)
_L4 = (89, 58, 128, 1536, 100, 48, 2.04)
_RTX_5090 = (120, 170, 128, 1536, 100, 96, 2.41)

GPUS = {
    "A100": Gpu(312e12, 80 * 10**9, 2.04e12, 300e9, 25e9, 156e12, *_A100),
    "H100": Gpu(989e12, 80 * 10**9, 3.35e12, 450e9, 50e9, 494.5e12, *_HOPPER),
    "H200": Gpu(989e12, 141 * 10**9, 4.8e12, 450e9, 50e9, 494.5e12, *_HOPPER),
    "B200": Gpu(2250e12, 180 * 10**9, 8.0e12, 900e9, 50e9, 1125e12, *_B200),
    "A10": Gpu(125e12, 24 * 10**9, 0.60e12, 0, 0, 62.5e12, *_A10),
    "L4": Gpu(121e12, 24 * 10**9, 0.30e12, 0, 0, 60e12, *_L4),
    "RTX 5090": Gpu(209.5e12, 32 * 10**9, 1.79e12, 0, 0, 104.8e12, *_RTX_5090),
}

ARCHITECTURES = {
    GPUS[name].target: GPUS[name] for name in ("A100", "A10", "L4", "H100", "B200", "RTX 5090")
}
"""Compilation target -> the product that represents it; in ascending compute capability."""


def per_device(chip: Tpu) -> Tpu:
    """The figures of one JAX device, which may be a part of a chip."""
    names = ("flops", "hbm_bandwidth", "intra_bandwidth", "inter_bandwidth")
    shares: dict[str, Any] = {name: getattr(chip, name) / chip.devices for name in names}
    for name in ("hbm_bytes", "cores", "devices"):
        shares[name] = getattr(chip, name) // chip.devices
    return chip._replace(**shares)


def gpu_by_device_kind(device_kind: str) -> Gpu | None:
    """The GPU with this `device_kind`, such as "NVIDIA H100 80GB HBM3"; None: not in the table.

    PCIe cards and the 40 GB A100 are slower than the table's module of that name: None for them.
    """
    if re.search(r"PCIe|NVL|40GB", device_kind, re.IGNORECASE):
        return None
    names = (name for name in GPUS if re.search(rf"\b{name}\b", device_kind))
    return GPUS.get(next(names, ""))


def peak_flops(device_kind: str) -> float | None:
    """Peak bfloat16 FLOP/s of one JAX device of this `device_kind`; None: not in the tables."""
    if device_kind in TPU_DEVICE_KINDS:
        return per_device(TPUS[TPU_DEVICE_KINDS[device_kind]]).flops
    gpu = gpu_by_device_kind(device_kind)
    return None if gpu is None else gpu.flops
