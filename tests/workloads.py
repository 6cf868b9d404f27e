"""Named workloads with real shapes, shared by tests, plans and benchmarks.

A workload is a frozen description; its users create the arrays.
"""

import dataclasses
from typing import Any

from xlstm_jax.modules import LargeConfig, LMConfig, MLSTMConfig, SLSTMConfig, at
from xlstm_jax.modules.baselines.options import HybridConfig, WindowConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLSTMWorkload:
    """A call of `ops.mlstm`: q and k are B T H K, v is B T H V."""

    B: int
    T: int
    H: int
    K: int
    V: int
    dtype: str = "bfloat16"

    @property
    def heads(self) -> tuple[int, int, int]:
        """H, K and V."""
        return self.H, self.K, self.V


@dataclasses.dataclass(frozen=True, kw_only=True)
class SLSTMWorkload:
    """A call of `ops.slstm`: x is B T 4 H K."""

    B: int
    T: int
    H: int
    K: int
    dtype: str = "bfloat16"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelWorkload:
    """A model and the shape of its batches."""

    model: LMConfig
    batch_size: int
    seq_len: int

    @property
    def tokens(self) -> int:
        """Tokens of one batch."""
        return self.batch_size * self.seq_len


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanWorkload:
    """A preset trained on a target of `xlstm_jax.plan`."""

    preset: str
    topology: str
    fsdp: int
    batch_size: int
    seq_len: int = 8192


TOKENS = 65_536
"""Tokens per call in benchmarks, constant over sequence lengths."""


def mlstm(H: int, K: int, V: int, *, T: int = 8192) -> MLSTMWorkload:
    """A workload of `TOKENS` tokens."""
    return MLSTMWorkload(B=TOKENS // T, T=T, H=H, K=K, V=V)


# Heads of the scaling study's presets `scaling_NAME`; the largest is that of xlstm_7b.
MLSTM_LADDER = {
    "160m": mlstm(6, 64, 128),
    "400m": mlstm(4, 128, 256),
    "830m": mlstm(4, 192, 384),
    "1.4b": mlstm(4, 256, 512),
    "2.7b": mlstm(5, 256, 512),
    "7b": mlstm(8, 256, 512),
}

MLSTM = {
    **MLSTM_LADDER,
    # Heads narrower than those of 7b, at which other kernels are measured.
    "16_heads": mlstm(16, 128, 256),
    "4_heads": mlstm(4, 64, 128),
    "square": mlstm(32, 128, 128),
    "narrow": mlstm(32, 64, 128),
}

SLSTM = {str(K): SLSTMWorkload(B=16, T=2048, H=4, K=K) for K in (64, 128, 256, 512)}
"""By head dimension."""

VOCAB_SIZE = 256  # bytes

# Models of the CPU benchmark of train steps: float32, without rematerialization.
LARGE = LMConfig(
    vocab_size=VOCAB_SIZE,
    dim=256,
    pattern="MMMM",
    large=LargeConfig(num_heads=4, ffn_dim=704),
    final_norm="rms",
    final_norm_eps=1e-6,
    logit_soft_cap=30.0,
    remat="none",
)
FIRST_GENERATION = LMConfig(
    vocab_size=VOCAB_SIZE,
    dim=128,
    pattern=at(6, slstm=[1]),
    mlstm=MLSTMConfig(num_heads=4),
    slstm=SLSTMConfig(num_heads=4),
    remat="none",
)

MODELS = {
    "large": ModelWorkload(model=LARGE, batch_size=4, seq_len=512),
    "v1": ModelWorkload(model=FIRST_GENERATION, batch_size=8, seq_len=256),
}
"""`peer_torch.py` builds the same models under the same names."""

PLANS_7B = (
    PlanWorkload(preset="xlstm_7b", topology="v5e:16x16", fsdp=64, batch_size=256),
    PlanWorkload(preset="xlstm_7b", topology="v6e:16x16", fsdp=16, batch_size=256),
    PlanWorkload(preset="xlstm_7b", topology="v5p:8x8x4", fsdp=16, batch_size=256),
    PlanWorkload(preset="xlstm_7b", topology="v5p:16x16x16", fsdp=16, batch_size=4096),
    PlanWorkload(preset="xlstm_7b", topology="h100:1x8", fsdp=8, batch_size=8),
    # The batch size of arXiv:2503.13427.
    PlanWorkload(preset="xlstm_7b", topology="h100:32x8", fsdp=8, batch_size=512),
)


def _baseline(pattern: str, **fields: Any) -> ModelWorkload:
    """A quarter of the width and a third of the depth of the models of 160 million parameters."""
    model = LMConfig(**dict(vocab_size=4096, dim=256, pattern=pattern, final_norm="rms") | fields)
    return ModelWorkload(model=model, batch_size=4, seq_len=512)


BASELINES = {
    "xLSTM[1:0]": _baseline("m" * 8),
    "xLSTM[7:1]": _baseline("mmmsmmmm"),
    "xLSTM (large)": _baseline("M" * 4),
    "hybrid": _baseline("h" * 4, hybrid=HybridConfig(window=128)),
    "Llama": _baseline("a" * 4, final_norm_eps=1e-6),
    "sliding window": _baseline("w" * 4, window=WindowConfig(window=128)),
    "Mamba": _baseline("b" * 8),
    "Mamba-2": _baseline("B" * 8),
    "gated delta net": _baseline("d" * 4),
    "RWKV-4": _baseline(
        "r" * 4, embedding_norm="layer_scale", final_norm="layer_scale", final_norm_bias=True
    ),
    "LSTM (block)": _baseline("L" * 4),
}
"""xLSTM and the models that it is compared with, at about equal sizes."""
