"""Model sizes of the papers by name, with the published parameter counts, and one of 70B.

Sources: arXiv:2405.04517 (table of sizes; sLSTM positions in the appendix), arXiv:2503.13427 (7B),
arXiv:2510.02228 (scaling study). Those of other models are in `baselines.presets`.
"""

from collections.abc import Callable, Mapping

from xlstm_jax.config.fields import did_you_mean
from xlstm_jax.errors import ConfigError, quote
from xlstm_jax.modules import options
from xlstm_jax.modules.baselines import presets as baselines
from xlstm_jax.modules.config import LMConfig
from xlstm_jax.modules.patterns import at, ratio_pattern

VOCAB_SIZE = 50304  # of the GPT-2 and GPT-NeoX tokenizers, padded

FIRST_GENERATION = {
    "125m": (768, 24, (3, 20)),
    "350m": (1024, 48, (3, 5, 7, 40, 42, 44)),
    "760m": (1536, 48, (3, 5, 7, 40, 42, 44)),
    "1.3b": (2048, 48, (3, 5, 7, 40, 42, 44)),
    "2.7b": (2560, 64, None),
}
"""Size -> dim, blocks, sLSTM positions of the 7:1 variant (unpublished for 2.7b: every eighth)."""

LADDER = {
    "160m": (768, 12, 6),
    "400m": (1024, 24, 4),
    "830m": (1536, 24, 4),
    "1.4b": (2048, 24, 4),
    "2.7b": (2560, 32, 5),
    "7b": (4096, 32, 8),
}
"""Size -> dim, blocks, heads of the runs with a fixed token-to-parameter ratio."""

GRID = {
    512: (4, (10, 12, 14, 16)),
    640: (5, (10, 12, 13, 14, 16)),
    768: (6, (12, 15, 18)),
    896: (7, (12, 15, 18, 21, 24, 27)),
    1024: (4, (18, 21, 24, 27, 30)),
    1152: (9, (24, 27, 30)),
    1280: (5, (24, 27, 30)),
    1408: (11, (24, 27, 30)),
    1536: (6, (24, 27, 30)),
    1792: (7, (24, 27, 30)),
    2048: (8, (24, 27, 30, 33, 36)),
    2304: (9, (24, 27, 30, 33)),
    2560: (10, (29, 32, 35, 38)),
    2816: (11, (30, 32, 34, 36)),
    3072: (12, (30, 32, 36)),
    3328: (13, (32, 36)),
    3584: (14, (32, 36)),
    4096: (16, (30, 32)),
}
"""Width -> heads, and numbers of blocks, of the runs with a fixed compute budget."""


CHECKPOINTS: Mapping[str, tuple[str, int]] = {
    # The address is in the abstract of arXiv:2503.13427.
    "xlstm_7b": ("hf://NX-AI/xLSTM-7b", 6_865_424_896),
}
"""Preset -> address of its published weights, and their parameter count."""


def get(name: str) -> LMConfig:
    """The config of a preset; raises ConfigError if no preset has this name."""
    if name not in PRESETS:
        examples = "presets.names() lists all, for example xlstm_7b or xlstm_125m_7:1."
        raise ConfigError(
            f"preset {quote(name)} is not known; {did_you_mean(name, PRESETS, examples)}"
        )
    return PRESETS[name]()


def names() -> tuple[str, ...]:
    """Names of all presets."""
    return tuple(PRESETS)


def first_generation(dim: int, pattern: str) -> LMConfig:
    """A model of first-generation blocks with the widths and numerics of arXiv:2405.04517."""
    return LMConfig(
        vocab_size=VOCAB_SIZE,
        dim=dim,
        pattern=pattern,
        mlstm=options.MLSTMConfig(inner_dim=options.first_generation_width(dim, 2.0)),
        slstm=options.SLSTMConfig(ffn_dim=options.first_generation_width(dim, 1.3)),
        dtype="bfloat16",
        remat="names",
    )


def large(
    dim: int, num_blocks: int, num_heads: int, ffn_dim: int, *, vocab_size: int = VOCAB_SIZE
) -> LMConfig:
    """A model of large-architecture blocks with the norms and soft caps of the 7B model."""
    return LMConfig(
        vocab_size=vocab_size,
        dim=dim,
        pattern="M" * num_blocks,
        large=options.LargeConfig(num_heads=num_heads, ffn_dim=ffn_dim),
        final_norm="rms",
        final_norm_eps=1e-6,
        logit_soft_cap=30.0,
        dtype="bfloat16",
        remat="names",
    )


def scaling(dim: int, num_blocks: int, num_heads: int) -> LMConfig:
    """A model of the scaling study, which rounds feed-forward widths differently from the 7B."""
    return large(dim, num_blocks, num_heads, options.scaling_width(dim))


def _presets() -> dict[str, Callable[[], LMConfig]]:
    table: dict[str, Callable[[], LMConfig]] = {
        "xlstm_7b": lambda: large(4096, 32, 8, options.large_width(4096, 2.6667)),
        # Not from a paper: twice the width of the 7B, with heads as wide, to plan larger runs.
        "xlstm_70b": lambda: large(8192, 86, 16, options.large_width(8192, 2.6667)),
    }
    # 2.7b has no published positions: its sLSTM blocks follow the ratio.
    for size, (dim, blocks, slstm) in FIRST_GENERATION.items():
        mixed = at(blocks, slstm=slstm) if slstm else ratio_pattern("7:1", blocks)
        for ratio, pattern in (("1:0", "m" * blocks), ("7:1", mixed)):
            # Defaults bind the loop variables now; a plain closure would see their last values.
            table[f"xlstm_{size}_{ratio}"] = lambda d=dim, p=pattern: first_generation(d, p)
    for size, shape in LADDER.items():
        table[f"scaling_{size}"] = lambda s=shape: scaling(*s)
    for dim, (heads, depths) in GRID.items():
        for blocks in depths:
            shape = (dim, blocks, heads)
            table[f"scaling_d{dim}_l{blocks}_h{heads}"] = lambda s=shape: scaling(*s)
    return table | baselines.presets(VOCAB_SIZE)


PRESETS = _presets()
