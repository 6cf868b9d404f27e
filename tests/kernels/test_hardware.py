"""The hardware table: figures of the data sheets and the per-core figures derived from them."""

import pytest

from pallas_kernels.hardware import (
    ARCHITECTURES,
    GIB,
    GPUS,
    MIB,
    TPU_DEVICE_KINDS,
    TPUS,
    gpu_by_device_kind,
    peak_flops,
    per_device,
)

# Google Cloud documentation, per chip: bfloat16 TFLOP/s, HBM GiB, HBM GB/s, TensorCores.
TPU_SHEETS = {
    "v4": (275, 32, 1228, 2),
    "v5e": (197, 16, 819, 1),
    "v5p": (459, 95, 2765, 2),
    "v6e": (918, 32, 1638, 1),
    "v7x": (2307, 192, 7380, 2),
}
TPU_LINKS = {"v4": 300, "v5e": 200, "v5p": 600, "v6e": 400, "v7x": 600}  # GB/s, one direction
VMEM_MIB = {"v4": 16, "v5e": 128, "v5p": 64, "v6e": 128, "v7x": 64}  # per core

# NVIDIA, SXM modules: dense bfloat16 TFLOP/s, memory GB, memory TB/s, multiprocessors.
GPU_SHEETS = {
    "A100": (312, 80, 2.04, 108),
    "H100": (989, 80, 3.35, 132),
    "H200": (989, 141, 4.8, 132),
    "B200": (2250, 180, 8.0, 148),
    "A10": (125, 24, 0.60, 72),
    "L4": (121, 24, 0.30, 58),
    "RTX 5090": (209.5, 32, 1.79, 170),
}
NETWORKS = {"A100": (300, 25), "H100": (450, 50), "H200": (450, 50), "B200": (900, 50)}  # GB/s
SHARED_KIB = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99}


@pytest.mark.parametrize("name", TPUS)
def test_tpu_figures_match_the_data_sheet(name):
    chip = TPUS[name]
    figures = chip.flops / 1e12, chip.hbm_bytes / GIB, chip.hbm_bandwidth / 1e9, chip.cores
    assert figures == pytest.approx(TPU_SHEETS[name], rel=1e-12)
    assert chip.intra_bandwidth == TPU_LINKS[name] * 1e9
    assert chip.vmem_bytes == VMEM_MIB[name] * MIB
    assert chip.target == name


@pytest.mark.parametrize("name", GPUS)
def test_gpu_figures_match_the_data_sheet(name):
    gpu = GPUS[name]
    figures = gpu.flops / 1e12, gpu.hbm_bytes / 1e9, gpu.hbm_bandwidth / 1e12, gpu.multiprocessors
    assert figures == pytest.approx(GPU_SHEETS[name], rel=1e-12)
    links = gpu.intra_bandwidth / 1e9, gpu.inter_bandwidth / 1e9
    assert links == NETWORKS.get(name, (0, 0))
    assert gpu.tf32_flops == pytest.approx(gpu.flops / 2, rel=0.01)


@pytest.mark.parametrize("name", TPUS)
def test_cores_split_the_bandwidth_and_the_peak_flops_of_a_chip(name):
    tflops, _, bandwidth, cores = TPU_SHEETS[name]
    chip = TPUS[name]
    assert chip.core_hbm_bandwidth == pytest.approx(bandwidth * 1e9 / cores, rel=1e-12)
    assert chip.core_flops == pytest.approx(tflops * 1e12 / cores, rel=1e-12)
    assert chip.clock * chip.flops_per_bundle * cores == pytest.approx(tflops * 1e12)
    assert 0.9e9 < chip.clock < 2.3e9


def test_a_v5p_core_has_half_of_the_chip_bandwidth():
    assert TPUS["v5p"].core_hbm_bandwidth == pytest.approx(1.3825e12)


def test_a_device_is_a_chip_except_on_v7x():
    for name in ("v4", "v5e", "v5p", "v6e"):
        assert per_device(TPUS[name]) == TPUS[name]
    device, chip = per_device(TPUS["v7x"]), TPUS["v7x"]
    assert device.hbm_bytes * 2 == chip.hbm_bytes and device.intra_bandwidth * 2 == 600e9
    assert (device.cores, device.devices) == (1, 1)
    assert device.core_flops == chip.core_flops and device.clock == chip.clock


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gpus_of_an_architecture_have_the_same_limits(name):
    assert ARCHITECTURES[name].shared_bytes == SHARED_KIB[name] << 10
    gpus = [gpu for gpu in GPUS.values() if gpu.target == name]
    assert ARCHITECTURES[name] == gpus[0]
    assert len({(gpu.capability, gpu.shared_bytes, gpu.threads) for gpu in gpus}) == 1
    assert ARCHITECTURES[name].has_wide_products == (name in ("sm_90", "sm_100"))


def test_every_gpu_and_every_tpu_has_a_compilation_target():
    assert {gpu.target for gpu in GPUS.values()} == set(ARCHITECTURES)
    assert set(TPU_DEVICE_KINDS.values()) == set(TPUS)


def test_networks_are_slower_than_memory():
    for chip in (*TPUS.values(), *GPUS.values()):
        if chip.intra_bandwidth:
            assert chip.inter_bandwidth < chip.intra_bandwidth < chip.hbm_bandwidth < chip.flops


def test_gpus_are_identified_by_device_kind():
    assert gpu_by_device_kind("NVIDIA H100 80GB HBM3") == GPUS["H100"]
    assert gpu_by_device_kind("NVIDIA GeForce RTX 5090") == GPUS["RTX 5090"]
    assert gpu_by_device_kind("NVIDIA H100 PCIe") is None


def test_peak_of_a_device_is_that_of_its_share_of_a_chip():
    assert peak_flops("TPU v5p") == TPUS["v5p"].flops
    assert peak_flops("TPU7x") == TPUS["v7x"].flops / 2
    assert peak_flops("NVIDIA H100 80GB HBM3") == GPUS["H100"].flops
    assert peak_flops("cpu") is None and peak_flops("NVIDIA H100 PCIe") is None
