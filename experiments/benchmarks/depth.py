"""Compile time of the train step of shallow and deep models, which must not grow with depth."""

import dataclasses
import time
from typing import Any

from experiments.benchmarks import cases
from tests.workloads import ModelWorkload
from xlstm_jax.modules import LargeConfig, LMConfig, MLSTMConfig, presets, ratio_pattern
from xlstm_jax.modules.patterns import split_runs
from xlstm_jax.modules.stack import choose_runs

SMALL = LMConfig(
    vocab_size=256,
    dim=64,
    pattern="M",
    mlstm=MLSTMConfig(num_heads=4),
    large=LargeConfig(num_heads=4),
    remat="names",
)
PRESET = "xlstm_350m_7:1"  # 48 blocks, sLSTM at 3, 5, 7, 40, 42, 44
SEQ_LEN = 128
SHORTENED = f"{PRESET} in 6"
PAIRS = (("M x 32", "M x 8"), ("7:1 x 32", "7:1 x 8"), (PRESET, SHORTENED))


def run(repeats: int) -> dict[str, Any]:
    """Compile times of all models, and the ratios of the deep to the shallow ones."""
    preset = dataclasses.replace(presets.get(PRESET), vocab_size=256)
    patterns = {f"M x {n}": "M" * n for n in (8, 32)}
    patterns |= {f"7:1 x {n}": ratio_pattern("7:1", n) for n in (8, 32)}
    models = {name: dataclasses.replace(SMALL, pattern=p) for name, p in patterns.items()}
    models[SHORTENED] = dataclasses.replace(preset, pattern=shortened(preset.pattern, 6))
    return compare({**models, PRESET: preset}, PAIRS, repeats)


def compare(
    models: dict[str, LMConfig], pairs: tuple[tuple[str, str], ...], repeats: int
) -> dict[str, Any]:
    """Compile times of all models, and for each pair the first over the second."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(repeats):
        for name, model in models.items():
            times[name].append(compile_seconds(model))
            print(f"compile {name}: {times[name][-1]:.1f} s")
    records = {
        name: {
            "pattern": model.pattern,
            "bodies": sum(len(run.unit) for run in choose_runs(model, SEQ_LEN)),  # blocks compiled
            "seconds": times[name],
        }
        for name, model in models.items()
    }
    ratios = {f"{a} / {b}": min(times[a]) / min(times[b]) for a, b in pairs}
    return {"models": records, "ratios": ratios}


def shortened(pattern: str, num_blocks: int) -> str:
    """The repeated units of a pattern, once each, up to `num_blocks` blocks."""
    return "".join(run.unit for run in split_runs(pattern))[:num_blocks]


def compile_seconds(model: LMConfig) -> float:
    """Seconds to trace, lower and compile the train step."""
    program = cases.make_program(ModelWorkload(model=model, batch_size=1, seq_len=SEQ_LEN))
    start = time.perf_counter()
    program.compile()
    return time.perf_counter() - start
