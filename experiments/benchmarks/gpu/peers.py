"""Times of the kernels of PyTorch packages, and the measured peak rates of the GPU."""

# pyright: reportMissingImports=false

import functools
import math
import time
from collections.abc import Callable
from typing import Any

from experiments.benchmarks import kernel_torch
from experiments.benchmarks.gpu.report import Record, Report
from experiments.benchmarks.gpu.settings import Heads, Settings
from experiments.benchmarks.gpu.speed import statistics

Run = Callable[[], Any]
PARTS = ("forward", "gradient")
SHAPES = 2
"""How many of the head sizes the mLSTM kernels are timed at."""


def peers(report: Report, settings: Settings) -> None:
    """Times every peer after one call of each, in which packages tune their kernels."""
    calls = []
    for name, make in candidates(settings):
        if report.is_timing:
            report.add(name, error="not prepared before the timing started")
            continue
        begin = time.time()
        try:
            run = make()
            run()
            _synchronize()
            calls.append((name, run))
            print("peers", name, f"prepared in {time.time() - begin:.0f} s", flush=True)
        except Exception as error:  # a failure must not prevent the other measurements
            report.fail(name, error)
    report.wait()
    for name, run in calls:
        with report.exclusive():
            report.add(name, functools.partial(time_run, run))
    with report.exclusive():
        report.add("ceilings", measure_ceilings)


def candidates(settings: Settings) -> list[tuple[str, Callable[[], Run]]]:
    """Names, and functions that return a call to be timed."""
    listed: list[tuple[str, Callable[[], Run]]] = []
    for heads in settings.heads[:SHAPES]:
        for package in ("mlstm_kernels", "fla"):
            for part in PARTS:
                make = functools.partial(mlstm, settings, package, heads, part)
                listed.append((f"{package} {heads} {part}", make))
    for part in PARTS:
        for backend in ("FLASH_ATTENTION", "CUDNN_ATTENTION"):
            make = functools.partial(attention, settings, backend, part)
            listed.append((f"{backend.lower()} 32 x 128 {part}", make))
    for K in (64, 128, 256) if settings.with_flashrnn else ():
        for part in PARTS:
            make = functools.partial(flashrnn, settings, K, part)
            listed.append((f"flashrnn slstm K={K} {part}", make))
    return listed


def mlstm(settings: Settings, package: str, heads: Heads, part: str) -> Run:
    """A call of the mLSTM of a package, as in `kernels.py`."""
    H, K, V = heads
    sizes = dict(B=settings.tokens // settings.length, T=settings.length, H=H, K=K, V=V)
    case = {**sizes, "dtype": "bfloat16", "op": "mlstm", "part": part}
    fn, args = kernel_torch.function(package, case), kernel_torch.arrays(package, case)
    return kernel_torch.make_call(fn, args, part)


def attention(settings: Settings, backend: str, part: str) -> Run:
    """A call of causal attention, as wide as the values of the mLSTM of 7B: 32 heads of 128."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    shape = (settings.tokens // settings.length, 32, settings.length, 128)
    args = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3)]

    def fn(q, k, v):
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    return kernel_torch.make_call(fn, args, part)


def flashrnn(settings: Settings, K: int, part: str) -> Run:
    """A call of the sLSTM of FlashRNN, whose kernels are built with nvcc."""
    import torch
    from flashrnn import flashrnn as fused

    B, T, H = settings.slstm_batch, settings.slstm_length, 4
    new = functools.partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    args = [new(B, T, 4, H, K), new(4, H, K, K) / math.sqrt(K), new(4, H, K)]
    options = dict(function="slstm", backend="cuda_fused", dtype="bfloat16")
    return kernel_torch.make_call(lambda Wx, R, b: fused(Wx, R, b, **options)[0], args, part)


def time_run(run: Run) -> Record:
    """Statistics of one call, over samples of several calls each."""
    for _ in range(5):
        run()
    _synchronize()
    each = kernel_torch.seconds_per_call(run, 1)
    launches = min(200, max(1, math.ceil(0.03 / each)))
    return statistics([kernel_torch.seconds_per_call(run, launches) for _ in range(15)])


def measure_ceilings() -> Record:
    """Measured bandwidth of a copy and rate of bfloat16 matrix products."""
    import torch

    x, y = (torch.randn(1 << 30, device="cuda", dtype=torch.float32) for _ in range(2))
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    record: Record = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    calls = {
        "copy_tb_s": (lambda: y.copy_(x), 2 * x.numel() * 4),
        "bf16_tflop_s": (lambda: a @ b, 2 * 8192**3),
    }
    for name, (run, work) in calls.items():
        run()
        record[name] = work / kernel_torch.seconds_per_call(run, 10) / 1e12
    return record


def _synchronize() -> None:
    import torch

    torch.cuda.synchronize()
