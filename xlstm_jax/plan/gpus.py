"""NVIDIA's GPUs by their data sheets: what XLA has to know to compile for one, and its peaks."""

import re
from typing import NamedTuple


class Device(NamedTuple):
    """One product; of those for data centres the module (SXM) with the most memory."""

    capability: int  # times ten
    multiprocessors: int
    float32_lanes: int  # of a multiprocessor
    threads: int  # of a multiprocessor, at most
    shared_kib: int  # of a multiprocessor; one program may have one less
    l2_mib: int
    memory_gb: int
    clock_ghz: float
    bytes_per_second: float  # of its memory
    bf16_flops: float  # per second, dense, summed in float32
    tf32_flops: float


DEVICES = {
    "A100": Device(80, 108, 64, 2048, 164, 40, 80, 1.41, 2.04e12, 312e12, 156e12),
    "H100": Device(90, 132, 128, 2048, 228, 50, 80, 1.98, 3.35e12, 989e12, 494.5e12),
    "H200": Device(90, 132, 128, 2048, 228, 50, 141, 1.98, 4.8e12, 989e12, 494.5e12),
    "B200": Device(100, 148, 128, 2048, 228, 126, 180, 1.96, 8.0e12, 2250e12, 1125e12),
    "A10": Device(86, 72, 128, 1536, 100, 6, 24, 1.70, 0.60e12, 125e12, 62.5e12),
    "L4": Device(89, 58, 128, 1536, 100, 48, 24, 2.04, 0.30e12, 121e12, 60e12),
    "RTX 5090": Device(120, 170, 128, 1536, 100, 96, 32, 2.41, 1.79e12, 209.5e12, 104.8e12),
}


def peaks(device_kind: str) -> Device | None:
    """Of a device by the name it reports, such as "NVIDIA H100 80GB HBM3"; None: not in the table.

    Cards for PCI slots, and an A100 of 40 GB, are slower than what has the same name here.
    """
    if re.search(r"PCIe|NVL|40GB", device_kind, re.IGNORECASE):
        return None
    found = (name for name in DEVICES if re.search(rf"\b{name}\b", device_kind))
    return DEVICES.get(next(found, ""))


def target_config(name: str) -> str:
    """A device as XLA's compiler wants it described, in protocol-buffer text."""
    device = DEVICES[name]
    shared = device.shared_kib << 10
    fields = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "shared_memory_per_block": 48 << 10,
        "shared_memory_per_core": shared,
        "shared_memory_per_block_optin": shared - 1024,
        "threads_per_core_limit": device.threads,
        "core_count": device.multiprocessors,
        "fpus_per_core": device.float32_lanes,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 65535,
        "block_dim_limit_z": 65535,
        "memory_bandwidth": int(device.bytes_per_second),
        "l2_cache_size": device.l2_mib << 20,
        "clock_rate_ghz": device.clock_ghz,
        "device_memory_size": device.memory_gb * 10**9,
        "registers_per_core_limit": 65536,
        "registers_per_block_limit": 65536,
    }
    info = " ".join(f"{key}: {value}" for key, value in fields.items())
    major, minor = divmod(device.capability, 10)
    return (
        f"gpu_device_info {{ {info} cuda_compute_capability {{ major: {major} minor: {minor} }} }} "
        'platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 } '
        "runtime_version { major: 12 minor: 8 patch: 0 } "
        f'device_description_str: "NVIDIA {name}"'
    )
