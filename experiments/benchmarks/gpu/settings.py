"""Settings of the GPU run: full sizes, and toy sizes that run on a CPU in seconds."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from experiments.benchmarks.kernel_cases import Case
from tests import workloads
from tests.workloads import ModelWorkload
from xlstm_jax import ops
from xlstm_jax.modules import LMConfig, presets
from xlstm_jax.ops import dispatch, registry

Heads = tuple[int, int, int]
"""H, K and V."""


def reference(op: str) -> str:
    """Name of the reference implementation of an op: the last in its table."""
    return list(ops.implementations(op))[-1]


def refusal(name: str, sizes: tuple[int, int, int, int, int], dtype: str) -> str | None:
    """Why an implementation of the mLSTM cannot run a call of sizes B T H K V; None if it can."""
    call = dispatch.Call(*sizes, jnp.dtype(dtype), dispatch.platform(), named=True)
    return dispatch.refusals(registry.TABLES["mlstm"], call)[name]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLSTMCheck:
    """An mLSTM call whose values and gradients are compared with the float64 recurrence."""

    name: str
    sizes: tuple[int, int, int, int, int]  # B T H K V
    dtype: str = "bfloat16"
    flags: bool = False  # whether to pass resets and a mask
    gate_scale: float = 1  # standard deviation of the gate pre-activations
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SLSTMCheck:
    """An sLSTM call, checked like `MLSTMCheck`."""

    name: str
    sizes: tuple[int, int, int, int]  # B T H K
    dtype: str = "bfloat16"
    flags: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Sizes and implementations for all sections."""

    smoke: bool
    dtype: str  # of timed calls and of `transform_sizes`
    mlstm: str  # implementations under test
    slstm: str
    other_mlstm: str  # another one, also measured where it runs
    heads: tuple[Heads, ...]  # the first entry is that of the 7B model
    few_heads: Heads  # of one sequence of `tokens`
    tokens: int  # per timed call
    length: int  # T of timed calls
    more_lengths: tuple[int, ...]  # additional T, timed with the first entry of `heads` only
    decode_batches: tuple[int, ...]
    decode_states: int  # a timed decode step updates at most this many states, one per layer
    slstm_dims: tuple[int, ...]
    slstm_batch: int
    slstm_length: int
    mlstm_checks: tuple[MLSTMCheck, ...]
    slstm_checks: tuple[SLSTMCheck, ...]
    step_fusion: tuple[bool | None, ...]  # dynamic-slice fusion of stacked steps; None: default
    step_sizes: tuple[int, int, int, int, int]  # of stacked decode steps: layers, B H K V
    transform_sizes: tuple[int, int, int, int, int, int]  # vmap and remat checks: groups, B T H K V
    poison_elements: int  # size of the NaN array that overwrites freed memory between runs
    train_steps: int  # including two warm-up steps
    models: tuple[tuple[str, ModelWorkload], ...]
    decode_model: LMConfig
    decode_steps: int  # tokens per timed call
    samples: dict[str, Any]  # options of `kernel_jax.samples`
    with_flashrnn: bool = False  # slow to start, because nvcc compiles its kernels

    def mlstm_case(
        self, part: str, heads: Heads, T: int | None = None, B: int | None = None
    ) -> Case:
        """A timed call of the mLSTM; by default B is `tokens / T`."""
        T = T or self.length
        H, K, V = heads
        sizes = dict(B=B or max(1, self.tokens // T), T=T, H=H, K=K, V=V)
        states = {"max_states": self.decode_states}
        return Case(op="mlstm", part=part, dtype=self.dtype, **sizes, **states)

    def slstm_case(self, part: str, K: int) -> Case:
        """A timed call of the sLSTM."""
        sizes = dict(B=self.slstm_batch, T=self.slstm_length, H=4, K=K, V=K)
        return Case(op="slstm", part=part, dtype=self.dtype, **sizes)


MLSTM_CHECKS = (
    MLSTMCheck(name="7b heads", sizes=(2, 512, 2, 256, 512)),
    MLSTMCheck(name="7b heads", sizes=(2, 512, 2, 256, 512), dtype="float32"),
    MLSTMCheck(name="160m heads", sizes=(2, 512, 3, 64, 128), flags=True),
    MLSTMCheck(name="160m heads", sizes=(2, 300, 3, 64, 128), dtype="float32", flags=True),
    MLSTMCheck(name="square heads", sizes=(2, 384, 2, 128, 128), flags=True),
    MLSTMCheck(name="400m heads", sizes=(2, 384, 2, 128, 256)),
    MLSTMCheck(name="odd sizes", sizes=(1, 301, 3, 40, 96), flags=True),
    MLSTMCheck(name="odd sizes", sizes=(1, 301, 3, 40, 96), dtype="float32", flags=True),
    MLSTMCheck(name="multiples of 64", sizes=(1, 200, 2, 192, 320)),
    MLSTMCheck(name="wide heads", sizes=(1, 256, 2, 512, 512)),
    MLSTMCheck(
        name="sigmoid, no normalizer",
        sizes=(1, 256, 2, 256, 512),
        options={"input_gate": "sigmoid", "normalize": False},
    ),
    MLSTMCheck(
        name="large gates", sizes=(2, 512, 2, 128, 256), dtype="float32", flags=True, gate_scale=8
    ),
    MLSTMCheck(name="long", sizes=(1, 4096, 1, 64, 128), dtype="float32"),
)
# Resident weights stay in shared memory; streamed weights are read from the L2 cache at every step.
SLSTM_CHECKS = (
    SLSTMCheck(name="resident weights", sizes=(3, 65, 2, 64)),
    SLSTMCheck(name="resident weights", sizes=(33, 40, 2, 64), dtype="float32"),
    SLSTMCheck(name="resident weights", sizes=(17, 64, 2, 128)),
    SLSTMCheck(name="streamed weights", sizes=(17, 64, 2, 128), dtype="float32"),
    SLSTMCheck(name="streamed weights", sizes=(17, 64, 2, 256)),
    SLSTMCheck(name="streamed weights", sizes=(4, 64, 1, 512), flags=False),
    SLSTMCheck(name="odd sizes", sizes=(5, 33, 3, 40)),
)


def full() -> Settings:
    """Settings for a Hopper GPU."""
    model = presets.get("scaling_160m")
    without_remat = dataclasses.replace(model, remat="none")
    names = ("7b", "16_heads", "square", "narrow")
    return Settings(
        smoke=False,
        dtype="bfloat16",
        mlstm="triton",
        slstm="triton",
        other_mlstm="mosaic_gpu",
        heads=tuple(workloads.MLSTM[name].heads for name in names),
        few_heads=(4, 64, 128),
        tokens=workloads.TOKENS,
        length=workloads.MLSTM["7b"].T,
        more_lengths=(2_048, 65_536),
        decode_batches=(1, 32, 256),
        decode_states=32,
        slstm_dims=tuple(workload.K for workload in workloads.SLSTM.values()),
        slstm_batch=16,
        slstm_length=2_048,
        mlstm_checks=MLSTM_CHECKS,
        slstm_checks=SLSTM_CHECKS,
        step_fusion=(None, False),
        step_sizes=(3, 2, 4, 256, 256),
        transform_sizes=(2, 2, 256, 2, 64, 128),
        poison_elements=1 << 28,
        train_steps=12,
        models=(
            ("remat of the preset", ModelWorkload(model=model, batch_size=16, seq_len=4_096)),
            ("no remat", ModelWorkload(model=without_remat, batch_size=16, seq_len=4_096)),
        ),
        decode_model=presets.get("xlstm_7b"),
        decode_steps=16,
        samples={"repeats": 15, "warmup": 5, "sample_seconds": 0.03},
    )


def smoke() -> Settings:
    """Settings for a CPU: toy sizes, and implementations for it."""
    model = dataclasses.replace(workloads.LARGE, dim=16, pattern="M", vocab_size=16)
    return Settings(
        smoke=True,
        dtype="float32",
        mlstm="parallel",
        slstm=reference("slstm"),
        other_mlstm="chunkwise",
        heads=((2, 16, 32),),
        few_heads=(1, 8, 16),
        tokens=32,
        length=32,
        more_lengths=(),
        decode_batches=(1,),
        decode_states=1,
        slstm_dims=(8,),
        slstm_batch=2,
        slstm_length=8,
        mlstm_checks=(MLSTMCheck(name="toy", sizes=(1, 9, 2, 4, 6), dtype="float32", flags=True),),
        slstm_checks=(SLSTMCheck(name="toy", sizes=(2, 5, 2, 4), dtype="float32"),),
        step_fusion=(None,),
        step_sizes=(2, 1, 2, 4, 4),
        transform_sizes=(2, 1, 8, 2, 4, 4),
        poison_elements=1 << 10,
        train_steps=3,
        models=(("toy", ModelWorkload(model=model, batch_size=1, seq_len=16)),),
        decode_model=model,
        decode_steps=2,
        samples={"repeats": 2, "warmup": 1, "sample_seconds": 1e-4},
    )
