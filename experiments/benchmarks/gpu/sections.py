"""The sections of the GPU run."""

from collections.abc import Callable

import jax

from experiments.benchmarks import kernel_jax
from experiments.benchmarks.gpu import correctness, models, peers, speed
from experiments.benchmarks.gpu.report import Report
from experiments.benchmarks.gpu.settings import Settings


def profile(report: Report, settings: Settings) -> None:
    """Runs the kernels of one gradient at the first head sizes twice, for a profiler."""
    case = settings.mlstm_case("gradient", settings.heads[0])
    program = kernel_jax.compile_case(case, settings.mlstm)
    call = kernel_jax.bind_inputs(case, settings.mlstm, program)
    for _ in range(2):
        jax.block_until_ready(call())
    report.add("gradient", profiled=2)


def sections() -> dict[str, Callable[..., None]]:
    """All sections by name."""
    return {
        "correctness": correctness.correctness,
        "other_correctness": correctness.other,
        "kernels": speed.kernels,
        "other": speed.other,
        "few_heads": speed.few_heads,
        "slstm": speed.slstm,
        "tiles": speed.tiles,
        "exported": speed.exported,
        "train": models.train,
        "decode": models.decode,
        "peers": peers.peers,
        "profile": profile,
    }
