"""Compile time of the train step for shallow and deep models: it must not grow with depth."""

import dataclasses
import time
from typing import Any

import jax

from experiments.benchmarks import cases
from experiments.benchmarks.cases import Case
from xlstm_jax.modules import LargeConfig, LMConfig, MLSTMConfig, presets, ratio_pattern
from xlstm_jax.modules.patterns import split_runs
from xlstm_jax.modules.stack import runs_of

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


def run(repeats: int) -> dict[str, Any]:
    """Seconds to trace and compile each model, and the ratios that are promised."""
    preset = dataclasses.replace(presets.get(PRESET), vocab_size=256)
    models = {
        "M x 8": dataclasses.replace(SMALL, pattern="M" * 8),
        "M x 32": dataclasses.replace(SMALL, pattern="M" * 32),
        "7:1 x 8": dataclasses.replace(SMALL, pattern=ratio_pattern("7:1", 8)),
        "7:1 x 32": dataclasses.replace(SMALL, pattern=ratio_pattern("7:1", 32)),
        SHORTENED: dataclasses.replace(preset, pattern=shortened(preset.pattern, 6)),
        PRESET: preset,
    }
    pairs = [("M x 32", "M x 8"), ("7:1 x 32", "7:1 x 8"), (PRESET, SHORTENED)]
    return compare(models, pairs, repeats)


def compare(
    models: dict[str, LMConfig], pairs: list[tuple[str, str]], repeats: int
) -> dict[str, Any]:
    """Compile times of all models, and of the first of each pair over the second."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(repeats):
        for name, model in models.items():
            times[name].append(compile_seconds(model))
    rows = {
        name: {"pattern": model.pattern, "bodies": num_bodies(model), "seconds": times[name]}
        for name, model in models.items()
    }
    return {
        "models": rows,
        "ratios": {f"{a} / {b}": min(times[a]) / min(times[b]) for a, b in pairs},
    }


def num_bodies(model: LMConfig) -> int:
    """Blocks that are compiled, forwards and backwards."""
    return sum(len(run.unit) for run in runs_of(model, SEQ_LEN))


def shortened(pattern: str, num_blocks: int) -> str:
    """The units of a pattern's runs, once each, up to so many blocks."""
    return "".join(run.unit for run in split_runs(pattern))[:num_blocks]


def compile_seconds(model: LMConfig) -> float:
    """To trace, lower and compile the train step, from shapes alone: no parameter is made."""
    step, first_state = cases.train_step(model)
    state = jax.eval_shape(first_state)
    batch = jax.eval_shape(
        lambda: cases.random_batch(Case(model=model, batch_size=1, seq_len=SEQ_LEN))
    )
    start = time.perf_counter()
    step.lower(state, batch).compile()
    return time.perf_counter() - start
